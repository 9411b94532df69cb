"""``torch.ops.rlpatch.skinny_linear``: a linear layer that knows the fastest kernel for a few rows.

A decode step multiplies as many rows as there are sequences, and what that costs is reading the weights. On an H200
cuBLAS reads those of an 8B model's layers at 2.5 to 3.6 TB/s for 8 rows, where 4.3 can be had (docs/steps.md): it
splits the sums of the smaller ones and adds them up in kernels of their own. `Choices.tune` times a handful of tiles of
`skinny_kernel` and cuBLASLt against it on the engine's own weights, once for each shape and size; what is not faster stays
cuBLAS's.
vLLM does the same by hand for some of its models (``vllm/models/*/nvidia/low_latency_gemm.py``, 0.33).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch

from rlpatch.decoding.clock import timed

logger = logging.getLogger("rlpatch")

SIZES = (16, 32, 64)  # rows that a kernel is made for; more are cuBLAS's, whose products then have enough to do
_MARGIN = 0.98  # of cuBLAS's time: what is no faster than that stays its
LT = "cublaslt"  # a product with a bias, if only of zeros, is cuBLASLt's, which is faster for some shapes


@dataclass(frozen=True)
class Tile:
    """How `skinny_kernel` is launched; see its arguments.

    Attributes:
        columns: Rows of the weight for each program.
        step: Elements of each at a time.
        stages: Steps in flight.
        swap: The weight as the left factor.
        warps: Of 32 threads each.
    """

    columns: int
    step: int
    stages: int
    swap: bool = False
    warps: int = 4

    def fits(self, columns: int, depth: int) -> bool:
        """Whether it covers a weight of this shape exactly."""
        return columns % self.columns == 0 and depth % self.step == 0


# For 16 and 64 rows the fastest of 84 and 57 tried with an 8B model's shapes on an H200, in the order in which one is
# taken among equals; for 32, those for the others were tried. What cuBLAS or cuBLASLt beat there is left out: each takes
# Triton 0.4 s of a cold start.
TILES: dict[int, tuple[Tile, ...]] = {
    16: (Tile(32, 128, 6), Tile(64, 128, 3, swap=True), Tile(32, 256, 6)),
    32: (Tile(64, 128, 4, swap=True), Tile(32, 128, 6)),
    64: (Tile(32, 256, 4),),
}

Shape = tuple[int, int, torch.dtype, torch.device]  # columns, depth


def size_for(rows: int) -> int | None:
    """The smallest of `SIZES` that holds so many rows, or None."""
    return next((size for size in SIZES if rows <= size), None)


@dataclass
class Choices:
    """Which kernel each shape and size takes.

    Attributes:
        taken: ``(shape, size)`` -> a tile, `LT`, or None where cuBLAS is as fast.
        seconds: The same -> seconds of cuBLAS, of cuBLASLt, and of the fastest tile where there is one.
        zeros: Shape -> ``[columns]``, the bias of a product without one where cuBLASLt is taken.
    """

    taken: dict[tuple[Shape, int], Tile | str | None] = field(default_factory=dict)
    seconds: dict[tuple[Shape, int], tuple[float, float, float | None]] = field(default_factory=dict)
    zeros: dict[Shape, torch.Tensor] = field(default_factory=dict)

    def tune(self, weights: Sequence[torch.Tensor], most_rows: int) -> list[tuple[Shape, int]]:
        """Time the tiles for these weights.

        Args:
            weights: ``[columns, depth]`` each, contiguous, 16-bit; on one device. Those of one shape are gone through in
                turn, so that none is still in a cache.
            most_rows: As many sequences can be decoded at once.

        Returns:
            The shapes and sizes looked at now or before.
        """
        shapes: dict[Shape, list[torch.Tensor]] = {}
        for weight in weights:
            shapes.setdefault(shape_of(weight), []).append(weight)
        largest = size_for(most_rows) or SIZES[-1]
        looked_at = [(shape, size) for shape in shapes for size in SIZES if size <= largest]
        begin = time.perf_counter()
        failed = [
            self._tune(shape, size, min(size, most_rows), shapes[shape])
            for shape, size in looked_at
            if (shape, size) not in self.taken
        ]
        if any(failed):
            logger.warning(
                "rlpatch: for some weights no kernel for few rows can be launched, cuBLAS's stay: %r",
                next(filter(None, failed)),
            )
        taken = sum(self.taken[key] is not None for key in looked_at)
        logger.info(
            "rlpatch: linear layers of decode steps: for %d of %d shapes and sizes a kernel for few rows or cuBLASLt's is "
            "faster than cuBLAS's (timed in %.1f s)", taken, len(looked_at), time.perf_counter() - begin,
        )  # fmt: skip
        return looked_at

    def describe(self, looked_at: Sequence[tuple[Shape, int]]) -> list[dict[str, Any]]:
        """Plain data for ``status()``: one entry per shape and size, with microseconds."""
        found = []
        for key in looked_at:
            (columns, depth, dtype, _), size = key
            (library, lt, ours), taken = self.seconds[key], self.taken[key]
            found.append({
                "weight": f"{columns} x {depth} {str(dtype).removeprefix('torch.')}",
                "rows": size,
                "cublas_us": round(library * 1e6, 1),
                "cublaslt_us": round(lt * 1e6, 1),
                "tile_us": round(ours * 1e6, 1) if ours is not None else None,
                "taken": f"{taken.columns} x {taken.step}" if isinstance(taken, Tile) else taken or "cublas",
            })  # fmt: skip
        return found

    def _tune(self, shape: Shape, size: int, rows: int, weights: list[torch.Tensor]) -> Exception | None:
        """Time one; returns why no tile that fits can be launched, if none can."""
        columns, depth, dtype, device = shape
        x = torch.ones(rows, depth, dtype=dtype, device=device)
        zeros = torch.zeros(columns, dtype=dtype, device=device)
        library = timed(lambda weight: torch.nn.functional.linear(x, weight), weights)
        lt = timed(lambda weight: torch.addmm(zeros, x, weight.t()), weights)
        best: Tile | None = None
        fastest: float | None = None
        failed: Exception | None = None
        for tile in TILES[size]:
            if not tile.fits(columns, depth):
                continue
            try:
                seconds = timed(partial(launch, x, bias=None, size=size, tile=tile), weights)
            except Exception as error:  # more shared memory than this GPU has, say: one candidate less
                logger.debug("rlpatch: %s for %s: %s", tile, shape, error)
                failed = error
                continue
            if fastest is None or seconds < fastest * _MARGIN:
                best, fastest = tile, seconds
        self.seconds[shape, size] = (library, lt, fastest)
        taken: Tile | str | None = LT if lt < library * _MARGIN else None
        if fastest is not None and fastest < min(library, lt) * _MARGIN:
            taken = best
        if taken == LT:
            self.zeros.setdefault(shape, zeros)  # a captured graph may read those that are there
        self.taken[shape, size] = taken
        return failed if fastest is None else None


CHOICES = Choices()  # of this process: shapes recur from engine to engine


def shape_of(weight: torch.Tensor) -> Shape:
    """What tells kernels apart."""
    return (weight.shape[0], weight.shape[1], weight.dtype, weight.device)


def usable(weight: Any) -> bool:
    """Whether `skinny_kernel` can multiply with it."""
    return (
        isinstance(weight, torch.Tensor)
        and weight.ndim == 2
        and weight.dtype in (torch.bfloat16, torch.float16)
        and weight.is_contiguous()
    )


def launch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, size: int, tile: Tile) -> torch.Tensor:
    """``x @ weight.T (+ bias)`` by `skinny_kernel`.

    Args:
        x: ``[rows, depth]``, contiguous, at most `size` rows.
        weight: ``[columns, depth]``, contiguous, of the same dtype; `tile` fits it.
        bias: ``[columns]`` or None.
        size: Of `SIZES`.
        tile: How.

    Returns:
        ``[rows, columns]`` of the same dtype; sums are fp32.
    """
    from rlpatch.decoding.linear_kernel import skinny_kernel
    from rlpatch.decoding.overlap import overlaps

    rows, depth = x.shape
    columns = weight.shape[0]
    out = x.new_empty(rows, columns)
    early = overlaps(x.device)
    skinny_kernel[(columns // tile.columns,)](
        x, weight, bias, out, rows, columns, depth,
        ROWS=size, COLUMNS=tile.columns, STEP=tile.step, SWAP=tile.swap, BIAS=bias is not None, PDL=early,
        num_warps=tile.warps, num_stages=tile.stages, **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return out


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    depth = x.shape[-1]
    rows = x.numel() // max(1, depth)
    size = size_for(rows)
    if size is not None and rows and x.is_contiguous() and x.dtype == weight.dtype:
        shape = shape_of(weight)
        taken = CHOICES.taken.get((shape, size))
        if isinstance(taken, Tile):
            return launch(x.view(rows, depth), weight, bias, size, taken).view(*x.shape[:-1], weight.shape[0])
        if taken == LT and bias is None:
            bias = CHOICES.zeros[shape]
    return torch.nn.functional.linear(x, weight, bias)


@lru_cache(maxsize=1)
def register() -> torch.library.Library:
    """Define ``torch.ops.rlpatch.skinny_linear(x, weight, bias) -> Tensor``, once per process.

    One operator for all sizes: to torch.compile it is opaque, and which kernel a captured graph has is settled when its
    size is captured.
    """
    library = torch.library.Library("rlpatch", "FRAGMENT")
    library.define("skinny_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
    library.impl("skinny_linear", _linear, "CompositeExplicitAutograd")

    def fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return x.new_empty(*x.shape[:-1], weight.shape[0])

    torch.library.register_fake("rlpatch::skinny_linear", fake, lib=library)
    return library
