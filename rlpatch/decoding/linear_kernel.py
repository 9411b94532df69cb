"""The kernel of `rlpatch.decoding.linear`: ``out[m, n] = Σ_k x[m, k]·weight[n, k] (+ bias[n])`` for some dozen rows.

What such a product costs is reading the weight once. Every program reads whole rows of it, `COLUMNS` of them, in steps of
`STEP` elements, several steps ahead (``num_stages``), and all of `x` beside them; nothing is split along k, so that sums
have one order and nothing is left to add up.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from rlpatch.decoding.overlap import gdc_launch_dependents, gdc_wait


@triton.jit(do_not_specialize=["rows"])
def skinny_kernel(
    x,  # [rows, depth], rows <= ROWS
    weight,  # [columns, depth], columns a multiple of COLUMNS, depth of STEP
    bias,  # [columns] if BIAS
    out,  # [rows, columns]
    rows,
    columns,
    depth,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    SWAP: tl.constexpr,  # the weight is the product's left factor, whose tiles are the larger ones
    BIAS: tl.constexpr,
    PDL: tl.constexpr,  # launched while the kernel before it ends (programmatic dependent launch)
):
    n = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    m = tl.arange(0, ROWS)
    k = tl.arange(0, STEP)
    weights = weight + n[:, None] * depth + k[None, :]
    xs = x + m[:, None] * depth + k[None, :]
    present = m[:, None] < rows
    if PDL:
        gdc_wait()  # nothing is read or written before whatever came earlier is there
        gdc_launch_dependents()
    if SWAP:
        total = tl.zeros((COLUMNS, ROWS), dtype=tl.float32)
    else:
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, depth, STEP):
        w = tl.load(weights + start, eviction_policy="evict_first")
        a = tl.load(xs + start, mask=present, other=0.0)
        if SWAP:
            total = tl.dot(w, a.T, total)
        else:
            total = tl.dot(a, w.T, total)
    if SWAP:
        total = total.T
    if BIAS:
        total += tl.load(bias + n).to(tl.float32)[None, :]
    places = out + m[:, None].to(tl.int64) * columns + n[None, :]
    tl.store(places, total.to(out.dtype.element_ty), mask=present)
