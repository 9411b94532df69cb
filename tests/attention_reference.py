"""What attention of a decode step is, in float64: what the kernels are held against."""

from __future__ import annotations

from typing import Any

import torch


def exact(query: Any, keys: Any, values: Any, table: Any, lengths: Any, scale: float) -> Any:
    """The arguments of `rlpatch.decoding.attention.attend` -> ``[sequences, heads, head]``, zeros without a context."""
    page, kv_heads, head = keys.shape[1:]
    out = torch.zeros_like(query, dtype=torch.float64)
    for row, length in enumerate(lengths.tolist()[: len(query)]):
        if length:
            pages = table[row, : -(-length // page)].long()
            k = keys[pages].reshape(-1, kv_heads, head)[:length].double()
            v = values[pages].reshape(-1, kv_heads, head)[:length].double()
            q = query[row].double().view(kv_heads, -1, head)
            p = torch.softmax(torch.einsum("hgd,nhd->hgn", q, k) * scale, -1)
            out[row] = torch.einsum("hgn,nhd->hgd", p, v).reshape(-1, head)
    return out
