"""Attention of a decode step over a paged KV cache, one program per sequence and KV head.

FlashAttention 3 computes tiles of 64 query rows or more, of which a decode step fills one for each query head of a group,
and keeps one tile on an SM at a time. With enough sequences to fill the device that leaves it waiting for memory: on an
H200, 64 sequences of 192 tokens take it 1.15 ms of a decode step of an 8B model, where reading their keys and values takes
0.4 (docs/steps.md). `decode_kernel` keeps several programs on every SM.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

HEADS = (64, 128)  # elements of a head that it was run with
_ONE = 512  # tokens: contexts of no more are never worth two pieces


@dataclass(frozen=True)
class Plan:
    """How `decode_kernel` is launched.

    Attributes:
        tile: Tokens at a time.
        stages: Steps in flight.
        piece: Tokens for one program, a multiple of `tile`.
        pieces: So many of them cover the longest context.
        warps: Of 32 threads each.
    """

    tile: int
    stages: int
    piece: int
    pieces: int = 1
    warps: int = 4


@dataclass(frozen=True)
class _Regime:
    """What was the fastest on an H200 with so many programs, or nearly, at 192 and at 1,088 tokens.

    Attributes:
        share: Sequences times KV heads, more than so many for each multiprocessor.
        tile: For a head of 128 elements.
        stages: Steps in flight.
        piece: Tokens.
        longest: Tokens; contexts that can be longer are the library's, which balances them better.
    """

    share: float
    tile: int
    stages: int
    piece: int
    longest: int


_REGIMES = (_Regime(2.9, 64, 3, 2048, 8192), _Regime(1, 128, 2, 512, 2560), _Regime(0.48, 128, 3, 256, 2560))


def plan(sequences: int, kv_heads: int, head: int, longest: int, multiprocessors: int) -> Plan | None:
    """How to compute so much attention, or None where the library's kernel is as fast, or nobody looked.

    Args:
        sequences: Decoded at once.
        kv_heads: Of each.
        head: Elements of a head, of `HEADS`.
        longest: Tokens that a context can have.
        multiprocessors: Of the device.
    """
    share = sequences * kv_heads / multiprocessors
    regime = next((regime for regime in _REGIMES if share > regime.share), None)
    if regime is None or longest > regime.longest:
        return None
    tile = regime.tile * 128 // head
    piece = -(-longest // tile) * tile if longest <= _ONE else max(regime.piece, tile)
    return Plan(tile, regime.stages, piece, -(-longest // piece))


@lru_cache(maxsize=8)
def multiprocessors(device: torch.device) -> int:
    """Of `device`, a CUDA one."""
    return torch.cuda.get_device_properties(device).multi_processor_count  # type: ignore[no-any-return]


_CELLS = 1 << 16  # sequences times KV heads
_arrived: dict[torch.device, torch.Tensor] = {}  # never replaced: graphs hold their addresses
_launched: dict[tuple[Any, ...], None] = {}  # in their order


def launched() -> list[dict[str, Any]]:
    """Plain data for ``status()``: the plans that this process has launched, none of them twice."""
    plans = dict.fromkeys(how for how, *_ in _launched)
    return [{"tile": how.tile, "stages": how.stages, "piece": how.piece, "pieces": how.pieces} for how in plans]


def _counters(device: torch.device) -> torch.Tensor:
    """Zeros for `decode_kernel`'s `arrived`, which leaves them zero: ``[_CELLS]`` int32, one for a device."""
    if device not in _arrived:
        _arrived[device] = torch.zeros(_CELLS, dtype=torch.int32, device=device)
    return _arrived[device]


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    how: Plan,
) -> bool:
    """``out[i] = softmax(scale · query[i] · keysᵢᵀ) · valuesᵢ`` for the last token of each sequence.

    One at a time on a device, if `how` has several pieces: they count in the same place.

    Args:
        query: ``[sequences, heads, head]``, bf16 or fp16; the last stride 1.
        keys: ``[pages, page, kv_heads, head]`` of the same dtype, by any strides but the last, which is 1.
        values: Like `keys`.
        table: ``[sequences, pages of the longest context]`` int32: which pages each has; the last stride 1.
        lengths: ``[sequences]`` int32: tokens of each, its last one included. 0 where there is no sequence.
        scale: Of the scores.
        out: Like `query`; written, with zeros where there is no sequence.
        how: From `plan`.

    Returns:
        Whether it was computed. False while a CUDA graph is captured that nothing like it was launched before: a graph's
        own memory is no place for what outlives it, nor its capture one for a compiler. False, too, for more sequences
        than there are counters.
    """
    from rlpatch.decoding.attention_kernel import decode_kernel
    from rlpatch.decoding.overlap import overlaps

    sequences, heads, head = query.shape
    page, kv_heads = keys.shape[1:3]
    group = heads // kv_heads
    cells = sequences * kv_heads
    split = how.pieces > 1
    if split and cells > _CELLS:
        return False
    strides = [tensor.stride() for tensor in (query, keys, values, out, table)]  # compiled in, where 16 divides them
    kind = (how, query.dtype, query.device, group, page, *strides)
    if query.is_cuda and torch.cuda.is_current_stream_capturing():
        if kind not in _launched:
            return False
    else:
        _launched[kind] = None
    partial = extremes = arrived = None
    if split:
        arrived = _counters(query.device)  # made before anything is captured: see above
        partial = torch.empty(cells, how.pieces, group, head, dtype=torch.float32, device=query.device)
        extremes = torch.empty(cells, how.pieces, group, 2, dtype=torch.float32, device=query.device)
    early = overlaps(query.device)
    decode_kernel[(kv_heads, sequences, how.pieces)](
        query, keys, values, out, table, lengths, partial, extremes, arrived, scale * 1.4426950408889634,
        query.stride(0), query.stride(1), *keys.stride()[:3], *values.stride()[:3], out.stride(0), out.stride(1),
        table.stride(0), PIECE=how.piece, GROUP=group, ROWS=max(16, 1 << (group - 1).bit_length()), HEAD=head, PAGE=page,
        TILE=how.tile, STAGES=how.stages, SPLIT=split, PDL=early, num_warps=how.warps,
        **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return True
