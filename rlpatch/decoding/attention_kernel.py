"""The kernel of `rlpatch.decoding.attention`: one query per sequence against its pages of the KV cache.

One program per sequence, KV head and piece of the context reads each key and value once, for all query heads that share
them. A context of one piece is written as it is; the pieces of a longer one are left in fp32, and whichever program comes
last puts them together, always in the same order. (Split softmax as in Flash-Decoding, Dao et al. 2023.)
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from rlpatch.decoding.overlap import gdc_launch_dependents, gdc_wait


@triton.jit(do_not_specialize=["scale"])
def decode_kernel(
    query,  # [sequences, kv_heads * GROUP, HEAD]
    keys,  # [pages, PAGE, kv_heads, HEAD], by strides; the last one 1
    values,
    out,  # like query
    table,  # [sequences, pages of a sequence] int32
    lengths,  # [sequences] int32; 0: no sequence, zeros are written
    partial,  # [sequences, kv_heads, pieces, GROUP, HEAD] fp32, if SPLIT
    extremes,  # [sequences, kv_heads, pieces, GROUP, 2] fp32, if SPLIT: maximum and sum
    arrived,  # [sequences, kv_heads] int32, zeros before and after, if SPLIT
    scale,  # of the scores, times log2(e)
    query_sequence,
    query_head,
    key_page,
    key_token,
    key_head,
    value_page,
    value_token,
    value_head,
    out_sequence,
    out_head,
    table_sequence,
    PIECE: tl.constexpr,  # tokens, a multiple of TILE
    GROUP: tl.constexpr,  # query heads of a KV head
    ROWS: tl.constexpr,  # GROUP, filled up to a size that tensor cores take
    HEAD: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,  # tokens at a time
    STAGES: tl.constexpr,  # of them in flight
    SPLIT: tl.constexpr,  # whether there are contexts of several pieces
    PDL: tl.constexpr,
):
    head = tl.program_id(0)
    sequence = tl.program_id(1).to(tl.int64)
    piece = tl.program_id(2)  # the slowest to count: second pieces come after all first ones
    g = tl.arange(0, ROWS)
    d = tl.arange(0, HEAD)
    t = tl.arange(0, TILE)
    mine = g[:, None] < GROUP
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    length = tl.load(lengths + sequence)
    begin = piece * PIECE
    end = tl.minimum(length, begin + PIECE)
    rows = (head * GROUP + g)[:, None]
    q = tl.load(query + sequence * query_sequence + rows * query_head + d[None, :], mask=mine, other=0.0)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, HEAD), tl.float32)
    for start in tl.range(begin, end, TILE, num_stages=STAGES):
        at = start + t
        there = at < end
        page = tl.load(table + sequence * table_sequence + at // PAGE, mask=there, other=0).to(tl.int64)
        places = page * key_page + (at % PAGE) * key_token + head * key_head
        k = tl.load(keys + places[:, None] + d[None, :], mask=there[:, None], other=0.0)
        scores = tl.where(there[None, :], tl.dot(q, k.T) * scale, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(top - higher)
        top = higher
        total = total * shrink + tl.sum(p, 1)
        places = page * value_page + (at % PAGE) * value_token + head * value_head
        v = tl.load(values + places[:, None] + d[None, :], mask=there[:, None], other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None])
    places = out + sequence * out_sequence + rows * out_head + d[None, :]
    if not SPLIT:
        _write(places, acc, total, mine)
    elif length <= PIECE:
        if piece == 0:
            _write(places, acc, total, mine)
    elif begin < length:
        cell = sequence * tl.num_programs(0) + head
        first = cell * tl.num_programs(2)
        _leave(partial, extremes, first + piece, acc, top, total, GROUP, ROWS, HEAD)
        tl.debug_barrier()  # every thread's part is stored before this one says so
        pieces = tl.cdiv(length, PIECE)
        if tl.atomic_add(arrived + cell, 1, sem="acq_rel") == pieces - 1:
            tl.store(arrived + cell, 0)
            acc, total = _together(partial, extremes, first, pieces, GROUP, ROWS, HEAD)
            _write(places, acc, total, mine)


@triton.jit
def _write(places, acc, total, mask):
    """The output of one program's query heads; zeros of those that attend to nothing."""
    tl.store(places, (acc / tl.maximum(total, 1e-30)[:, None]).to(places.dtype.element_ty), mask=mask)


@triton.jit
def _leave(partial, extremes, slot, acc, top, total, GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD: tl.constexpr):
    """One piece's part, for `_together`."""
    g = tl.arange(0, ROWS)
    mine = g < GROUP
    rows = slot * GROUP + g
    tl.store(partial + rows[:, None] * HEAD + tl.arange(0, HEAD)[None, :], acc, mask=mine[:, None])
    tl.store(extremes + rows * 2, top, mask=mine)
    tl.store(extremes + rows * 2 + 1, total, mask=mine)


@triton.jit
def _together(partial, extremes, first, pieces, GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD: tl.constexpr):
    """What the pieces from slot `first` on have left: the weighted values and the weights' sum."""
    g = tl.arange(0, ROWS)
    d = tl.arange(0, HEAD)
    mine = g < GROUP
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, HEAD), tl.float32)
    for piece in range(pieces):
        rows = (first + piece) * GROUP + g
        # not from this multiprocessor's own cache: others have written it
        peak = tl.load(extremes + rows * 2, mask=mine, other=0.0, cache_modifier=".cg")
        weight = tl.load(extremes + rows * 2 + 1, mask=mine, other=0.0, cache_modifier=".cg")
        part = partial + rows[:, None] * HEAD + d[None, :]
        sums = tl.load(part, mask=mine[:, None], other=0.0, cache_modifier=".cg")
        higher = tl.maximum(top, peak)
        shrink = tl.exp2(top - higher)
        grow = tl.exp2(peak - higher)
        top = higher
        total = total * shrink + weight * grow
        acc = acc * shrink[:, None] + sums * grow[:, None]
    return acc, total
