"""The fold's passes in Triton: read a tile, make its low-rank delta in registers, write, keep what is lost.

Each direction reads and writes every weight once (bf16: 4 bytes per element and direction), in one launch per shape of
weight. A tile's delta comes from ``tl.dot`` on fp32 adapters; for weights of 16 bits each factor is split into two bf16
terms (an error of 2^-16 where the sum is rounded to 2^-8 or 2^-11), weights of 32 bits take plain fp32 products. Fold and
unfold are the same kernel, compiled without contraction of multiply and add, so that both make the same delta, bit for
bit.

The kernel works on words of 32 bits, which hold two elements of 16: half the arithmetic on integers. A word that the
round trip does not restore costs 2 bytes: its place in the tile (11 bits), which element differs (1), and a code (4) for
the difference of the bits, from -7 to 8; another difference, or two, take 4 bytes more. Tiles reserve room with an atomic
counter; a tile that finds none leaves its weights alone, and the launch is repeated with more room.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from rlpatch.errors import FoldError
from rlpatch.lora.fold import Work, not_finite, nothing
from rlpatch.lora.target import Product, Target

logger = logging.getLogger("rlpatch")

# A tile in words (a row's marks are 32 bits), and tiles per program: of 16 to 64 rows and 1 to 4 warps the fastest on an
# H200. A warp with a tile of its own waits at no barriers; the instructions that Hopper has for products of 64 rows want
# four warps and fences, and with them the kernel took twice the time that memory needs.
BLOCK_ROWS, BLOCK_WORDS, STRIP = 16, 32, 8
OPTIONS: dict[str, int] = {"num_warps": 1, "num_stages": 1, "maxnreg": 168}
UNFOLD_OPTIONS: dict[str, int] = {"num_warps": 1, "num_stages": 1, "maxnreg": 112}
_FOLD, _FOLD_REST, _UNFOLD = 0, 1, 2
_ABSENT, _NOT_FINITE = -1, -2  # a tile's state
_FIRST_SHARE = 4e-4  # words per element; grows with what folds turn out to need
_GROWTH = 1.1
_LEAST_ROOM = 1 << 14  # words
_CHUNK = 96 << 20  # bytes of factors per launch
_BLOCK = 1024  # of their elements per program
_FACTORS = {torch.float32, torch.bfloat16, torch.float16}


@functools.cache
def available() -> bool:
    """Whether Triton can compile for this GPU; when not, the fold runs in plain torch and says so once."""
    try:
        weight = torch.ones(16, 16, dtype=torch.float16, device="cuda")
        low = torch.ones(16, 16, device="cuda")
        passes = TritonPasses()
        passes.fold([Target("probe", weight, (Product(low, low, 1.0),))])
        return bool((weight == 17).all())
    except Exception as error:  # no Triton, no compiler, a chip that it does not know
        logger.warning("rlpatch: folding runs in plain torch, because Triton does not serve this GPU: %s", error)
        return False


class _Shape(NamedTuple):
    """What weights of one launch have in common.

    Attributes:
        whole: Words can be read as such; else as two elements of 16 bits.
        strides: Of source and target, rows and columns, in words if `whole`, else in elements.
    """

    dtype: torch.dtype
    whole: bool
    aligned: bool
    rows: int
    columns: int
    strides: tuple[int, ...]
    rank: int

    @property
    def words(self) -> int:
        """In a row."""
        return -(-self.columns // (4 // self.dtype.itemsize))

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tiles."""
        return -(-self.rows // BLOCK_ROWS), -(-self.words // BLOCK_WORDS)

    @property
    def tiles(self) -> int:
        """Of one weight."""
        return self.grid[0] * self.grid[1]


class _Sides(NamedTuple):
    """One weight as the kernel sees it: the faster dimension last, one low-rank product."""

    number: int
    weight: torch.Tensor
    into: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor
    scale: float

    @classmethod
    def of(cls, number: int, target: Target, into: torch.Tensor) -> _Sides:
        left, right, scale = _one_product(target)
        weight = target.weight
        if abs(weight.stride(1)) > abs(weight.stride(0)):
            weight, into, left, right = weight.T, into.T, right.T, left.T
        return cls(number, weight, into, left, right, scale)

    def kind(self) -> tuple[Any, ...]:
        """What `shape` depends on; it is asked for every weight before the device has anything to do."""
        weight, into = self.weight, self.into
        places = weight.data_ptr() % 16, into.data_ptr() % 16
        factors = [(side.dtype, side.shape, side.stride()) for side in (self.left, self.right)]
        return weight.dtype, weight.shape, weight.stride(), into.stride(), places, *factors

    def shape(self) -> _Shape:
        """What weights of one launch have in common."""
        weight = self.weight
        both = (weight,) if self.into is weight else (weight, self.into)
        places, strides = [tensor.data_ptr() for tensor in both], [tensor.stride() for tensor in both]
        rows, columns = weight.shape
        whole = weight.element_size() == 4
        if not whole and columns % 2 == 0:
            whole = all(row % 2 == 0 and column == 1 for row, column in strides) and all(p % 4 == 0 for p in places)
            strides = [(row // 2, 1) for row, _ in strides] if whole else strides
        aligned = all(place % 16 == 0 for place in places)
        return _Shape(weight.dtype, whole, aligned, rows, columns, strides[0] + strides[-1], self.left.shape[1])

    def row(self) -> list[int]:
        """Its row of the kernels' table, field by field as here."""
        addresses = (tensor.data_ptr() for tensor in (self.weight, self.into, self.left, self.right))
        return [self.number, *addresses]


@dataclass(frozen=True)
class _Launch:
    """Weights of one shape, their tiles' place in the state, and what the kernels read about them.

    The table and the scales are made for all launches before the first: a copy from the host would wait for the kernels
    before it.
    """

    sides: tuple[_Sides, ...]
    shape: _Shape
    first_tile: int
    table: torch.Tensor
    scales: torch.Tensor

    def __call__(
        self, mode: int, desk: _Desk, state: Any, words: Any, counters: Any, sums: Any, room: int, check: bool = True
    ) -> None:
        from rlpatch.lora.triton_kernel import fold_kernel

        shape, device = self.shape, self.sides[0].weight.device
        split = _splits(shape.dtype, device)
        left, right = desk.factors(self, split)
        block = 16 if shape.rank <= 16 else 32
        down, across = shape.grid
        even = (
            shape.whole and shape.rows % BLOCK_ROWS == 0 and shape.words % BLOCK_WORDS == 0 and shape.rank % block == 0
        )
        strides = shape.strides
        farthest = max(shape.rows * strides[n] + shape.columns * strides[n + 1] for n in (0, 2))
        fold_kernel[(across * -(-down // STRIP), len(self.sides))](
            self.table, left, right, state, words, counters, sums, self.table.stride(0), shape.rows, shape.columns,
            *strides, shape.rank, shape.words, across, self.first_tile, room,
            MODE=mode, KIND=str(shape.dtype).removeprefix("torch."), WHOLE=shape.whole, ALIGNED=shape.aligned,
            EVEN=even, LARGE=farthest >= 1 << 31, SPLIT=split, NVIDIA=split, CHECK=check or not split,
            ROWS=BLOCK_ROWS, WORDS=BLOCK_WORDS, RANK=block,
            ONE=shape.rank <= block, STRIP=STRIP, enable_fp_fusion=False,
            **(UNFOLD_OPTIONS if mode == _UNFOLD else OPTIONS),
        )  # fmt: skip


class _Desk:
    """Memory in which the factors of one launch after the other are made ready.

    Args:
        launches: All that will use it.
    """

    def __init__(self, launches: Sequence[_Launch]) -> None:
        sizes = [_room(one, one.shape.rows) + _room(one, one.shape.columns + 1) for one in launches]
        self._ready = torch.empty(max(sizes), dtype=torch.float32, device=launches[0].table.device)

    def factors(self, launch: _Launch, split: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Both sides as the kernel wants them: fp32 in one term, or in two bf16 terms whose sum has 16 bits of it.

        Returns:
            ``[weights, terms, 1, rows, rank]``, the scale multiplied in, and ``[weights, terms, parts, rank, columns /
            parts]``: of weights of 16 bits the even columns and the odd ones, else one part.
        """
        size = _room(launch, launch.shape.rows)
        memory = self._ready.view(torch.bfloat16) if split else self._ready
        cut = 2 * size if split else size
        _place(launch, "left", memory[:cut], 1, split)
        _place(launch, "right", memory[cut:], 4 // launch.shape.dtype.itemsize, split)
        return memory[:cut], memory[cut:]


def _room(launch: _Launch, length: int) -> int:
    """Elements of fp32 for one side of all its products; 16 bytes are aligned."""
    return -(-len(launch.sides) * length * launch.shape.rank // 4) * 4


def _place(launch: _Launch, side: str, into: torch.Tensor, parts: int, split: bool) -> None:
    """One side's factors, to which the table has the addresses."""
    from rlpatch.lora.triton_kernel import factors_kernel

    one: torch.Tensor = getattr(launch.sides[0], side)
    field = _Sides._fields.index(side)
    rows, columns = one.shape
    width = -(-columns // parts)
    factors_kernel[(-(-rows * width // _BLOCK), len(launch.sides))](
        launch.table[:, field], launch.scales, into, launch.table.stride(0), rows, columns, *one.stride(), width,
        KIND=str(one.dtype).removeprefix("torch."), SCALED=side == "left", PARTS=parts, SPLIT=split, BLOCK=_BLOCK,
        enable_fp_fusion=False,
    )  # fmt: skip


class TritonPasses:
    """The passes on CUDA for weights of bf16, fp16 and fp32; see the module's docstring for what they keep."""

    def __init__(self) -> None:
        self._need = 0.0  # words that the last fold asked for, per element
        self._sums: list[int] = []  # of bases that were found to be finite
        self._state: torch.Tensor | None = None
        self._words: torch.Tensor | None = None
        self._launches: list[_Launch] = []
        self._unfolded = 0  # launches of an unfold that an error has stopped, and its sums until then
        self._back: torch.Tensor | None = None
        self._kept = 0

    def fold(self, targets: Sequence[Target], meanwhile: Work = nothing) -> list[int]:
        """See `rlpatch.lora.fold.Passes`."""
        device = targets[0].weight.device
        self._launches = _launches([_Sides.of(n, target, target.weight) for n, target in enumerate(targets)])
        tiles = self._launches[-1].first_tile + self._launches[-1].shape.tiles * len(self._launches[-1].sides)
        state = self._state = torch.full((tiles,), _ABSENT, dtype=torch.int64, device=device)
        sums = torch.zeros(len(targets), dtype=torch.int64, device=device)
        elements = sum(target.weight.numel() for target in targets)
        room = max(_LEAST_ROOM, int(elements * max(_FIRST_SHARE, _GROWTH * self._need)))
        words = self._words = torch.empty(room, dtype=torch.int16, device=device)
        desk = _Desk(self._launches)
        used, mode, check = 0, _FOLD, not self._sums
        try:
            while True:
                counters = torch.zeros(3, dtype=torch.int64, device=device)
                counters[0].fill_(used)
                for launch in self._launches:
                    launch(mode, desk, state, words, counters, sums, room, check)
                meanwhile()
                meanwhile = nothing
                # all that is to be known in one copy, because each waits for the device
                found = torch.cat([counters, (state & 0xFFF).sum()[None], sums]).tolist()
                asked, without_room, unusable, kept = found[:4]
                if unusable:
                    raise self._not_finite(targets)
                if not without_room:
                    break
                self._need = asked / elements  # for the next fold, if there is no memory now
                # What was filled lies below `room`; the tiles that found none asked for the rest.
                mode, used, room = _FOLD_REST, room, room + asked - used
                larger = torch.empty(room, dtype=torch.int16, device=device)
                larger[:used].copy_(words)
                words = self._words = larger
        except BaseException:  # out of memory, too: the KV cache may have taken it meanwhile
            try:
                self._unfold(targets, desk)
            finally:
                self.forget()
            raise
        self._kept, self._need = kept, asked / elements
        found = [value & 0xFFFFFFFF for value in found[4:]]
        self._sums = found if check or found == self._sums else []  # another base is checked anew at the next fold
        return found

    def _not_finite(self, targets: Sequence[Target]) -> FoldError:
        """Names the weight of a tile that holds what cannot be folded."""
        assert self._state is not None
        tile = int((self._state == _NOT_FINITE).nonzero()[0])
        launch = next(one for one in reversed(self._launches) if one.first_tile <= tile)
        return not_finite(targets[launch.sides[(tile - launch.first_tile) // launch.shape.tiles].number])

    def unfold(self, targets: Sequence[Target], meanwhile: Work = nothing) -> list[int]:
        """See `rlpatch.lora.fold.Passes`. After an error (out of memory) another call goes on where it was."""
        return self._unfold(targets, _Desk(self._launches[self._unfolded :] or self._launches), meanwhile)

    def _unfold(self, targets: Sequence[Target], desk: _Desk, meanwhile: Work = nothing) -> list[int]:
        if self._back is None:
            self._back = torch.zeros(len(targets), dtype=torch.int64, device=targets[0].weight.device)
        for launch in self._launches[self._unfolded :]:
            launch(_UNFOLD, desk, self._state, self._words, self._back, self._back, 0)
            self._unfolded += 1
        meanwhile()
        return [value & 0xFFFFFFFF for value in self._back.tolist()]

    def original(self, index: int, target: Target) -> torch.Tensor:
        """See `rlpatch.lora.fold.Passes`."""
        number, launch, position = next(
            (i, one, n)
            for i, one in enumerate(self._launches)
            for n, side in enumerate(one.sides)
            if side.number == index
        )
        if number < self._unfolded:
            return target.weight.clone()
        copy = torch.empty_like(target.weight)
        sums = torch.zeros(1, dtype=torch.int64, device=copy.device)
        (alone,) = _launches([_Sides.of(0, target, copy)], launch.first_tile + position * launch.shape.tiles)
        alone(_UNFOLD, _Desk([alone]), self._state, self._words, sums, sums, 0)
        return copy

    def kept(self) -> tuple[int, int]:
        """See `rlpatch.lora.fold.Passes`."""
        return self._kept, sum(t.nbytes for t in (self._words, self._state) if t is not None)

    def forget(self) -> None:
        """See `rlpatch.lora.fold.Passes`."""
        self._state = self._words = self._back = None
        self._launches, self._unfolded, self._kept = [], 0, 0


def _launches(sides: list[_Sides], first_tile: int = 0) -> list[_Launch]:
    alike: dict[tuple[Any, ...], list[_Sides]] = {}
    for side in sides:
        alike.setdefault(side.kind(), []).append(side)
    ordered = [side for group in alike.values() for side in group]
    device = sides[0].weight.device
    table = torch.tensor([side.row() for side in ordered], dtype=torch.int64, device=device)
    scales = torch.tensor([side.scale for side in ordered], dtype=torch.float32, device=device)
    found, at = [], 0
    for group in alike.values():
        shape = group[0].shape()
        # a grid ends at 65535 weights
        step = max(1, min(1 << 15, _CHUNK // (4 * (shape.rows + shape.columns) * shape.rank)))
        for start in range(0, len(group), step):
            part = tuple(group[start : start + step])
            mine = slice(at, at + len(part))
            found.append(_Launch(part, shape, first_tile, table[mine], scales[mine]))
            first_tile += shape.tiles * len(part)
            at += len(part)
    return found


def _one_product(target: Target) -> tuple[torch.Tensor, torch.Tensor, float]:
    """One product per weight: the adapter's own tensors where there is one, else a copy of all."""
    kinds = {side.dtype for product in target.products for side in (product.left, product.right)}
    if len(target.products) == 1 and kinds <= _FACTORS:
        product = target.products[0]
        return product.left, product.right, product.scale
    left = torch.cat([product.left.float() * product.scale for product in target.products], 1)
    right = torch.cat([product.right.float() for product in target.products], 0)
    return left, right, 1.0


@functools.cache
def _splits(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether tensor cores multiply bf16 here (NVIDIA Ampere and later) and the weights need no more than that."""
    return dtype.itemsize == 2 and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
