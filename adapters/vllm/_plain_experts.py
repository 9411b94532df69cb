"""Mixture-of-experts in plain torch on unpacked weights, shared by the CPU adapters."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def _activate(name: str, x: torch.Tensor) -> torch.Tensor:
    """Gated activation over the last dimension, ``[…, 2·I] → […, I]``; names are vLLM's ``MoEActivation`` values."""
    if name == "swigluoai":
        gate, up = x[..., ::2].clamp(max=7.0), x[..., 1::2].clamp(min=-7.0, max=7.0)
        return (up + 1) * gate * torch.sigmoid(gate * 1.702)
    gate, up = x.chunk(2, dim=-1)
    if name == "silu":
        return F.silu(gate) * up
    if name in ("gelu", "gelu_tanh"):
        return F.gelu(gate, approximate="tanh" if name == "gelu_tanh" else "none") * up
    raise NotImplementedError(
        f"no plain form of the expert activation {name!r}; exclude='cpu_weights' keeps vLLM's kernel"
    )


def plain_experts(
    hidden: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    w13_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
    weights: torch.Tensor,
    ids: torch.Tensor,
    activation: str,
    isa: str,
    skip_weighted: bool = False,
) -> torch.Tensor:
    """The contract of vLLM's ``cpu_fused_moe``, on weights as the checkpoint lays them out.

    Args:
        hidden: ``[tokens, H]``.
        w13: ``[experts, 2·I, H]``, gate rows then up rows.
        w2: ``[experts, H, I]``.
        w13_bias: ``[experts, 2·I]`` or None.
        w2_bias: ``[experts, H]`` or None.
        weights: ``[tokens, k]`` router weights.
        ids: ``[tokens, k]`` expert indices.
        activation: vLLM's name of the gated activation.
        isa: Ignored (vLLM's choice of kernel).
        skip_weighted: Router weights were applied to the input already.

    Returns:
        ``[tokens, H]`` in `hidden`'s dtype.
    """
    out = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    for expert in ids.unique().tolist():
        token, slot = torch.where(ids == expert)
        x = F.linear(hidden[token], w13[expert], None if w13_bias is None else w13_bias[expert].to(hidden.dtype))
        x = F.linear(
            _activate(activation, x), w2[expert], None if w2_bias is None else w2_bias[expert].to(hidden.dtype)
        )
        scaled = x.float() if skip_weighted else x.float() * weights[token, slot, None].float()
        out.index_add_(0, token, scaled)
    return out.to(hidden.dtype)
