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
    if SPLIT:
        if length > PIECE:
            if begin < length:
                cell = sequence * tl.num_programs(0) + head
                slot = cell * tl.num_programs(2) + piece
                offsets = g[:, None] * HEAD + d[None, :]
                tl.store(partial + slot * GROUP * HEAD + offsets, acc, mask=mine)
                tl.store(extremes + (slot * GROUP + g) * 2, top, mask=g < GROUP)
                tl.store(extremes + (slot * GROUP + g) * 2 + 1, total, mask=g < GROUP)
                tl.debug_barrier()  # every thread's part is stored before this one says so
                pieces = tl.cdiv(length, PIECE)
                if tl.atomic_add(arrived + cell, 1, sem="acq_rel") == pieces - 1:
                    tl.store(arrived + cell, 0)
                    top = tl.full((ROWS,), float("-inf"), tl.float32)
                    total = tl.zeros((ROWS,), tl.float32)
                    acc = tl.zeros((ROWS, HEAD), tl.float32)
                    first = cell * tl.num_programs(2)
                    for other in range(pieces):
                        slot = first + other
                        theirs = extremes + (slot * GROUP + g) * 2
                        peak = tl.load(theirs, mask=g < GROUP, other=0.0, cache_modifier=".cg")
                        weight = tl.load(theirs + 1, mask=g < GROUP, other=0.0, cache_modifier=".cg")
                        sums = tl.load(
                            partial + slot * GROUP * HEAD + offsets, mask=mine, other=0.0, cache_modifier=".cg"
                        )
                        higher = tl.maximum(top, peak)
                        shrink = tl.exp2(top - higher)
                        grow = tl.exp2(peak - higher)
                        top = higher
                        total = total * shrink + weight * grow
                        acc = acc * shrink[:, None] + sums * grow[:, None]
                    tl.store(places, (acc / tl.maximum(total, 1e-30)[:, None]).to(out.dtype.element_ty), mask=mine)
        elif piece == 0:
            tl.store(places, (acc / tl.maximum(total, 1e-30)[:, None]).to(out.dtype.element_ty), mask=mine)
    else:
        tl.store(places, (acc / tl.maximum(total, 1e-30)[:, None]).to(out.dtype.element_ty), mask=mine)
