"""The fold's passes as one Triton kernel: read a tile, make its low-rank delta in registers, write, keep what is lost.

Per weight and direction one launch reads and writes each element once (bf16: 4 bytes per element and direction). The
tile's delta comes from ``tl.dot`` on fp32 adapters; for weights of 16 bits each factor is split into two bf16 terms (an
error of 2^-16 where the sum is rounded to 2^-8 or 2^-11), weights of 32 bits take plain fp32 products. Fold and unfold are the same kernel, compiled
without contraction of multiply and add, so that both make the same delta, bit for bit.

An element that the round trip does not restore costs 2 bytes: its place in the tile (13 bits) and the difference of the
bits (3: up to 4 either way); a larger difference takes 6. Tiles reserve room with an atomic counter; a tile that finds
none leaves its weights alone, and the launch is repeated with more room.
"""

# mypy: disable-error-code="no-untyped-def"  (a kernel's arguments are Triton's to type)

from __future__ import annotations

import functools
import logging
import struct
from collections.abc import Sequence

import torch

from rlpatch.errors import FoldError
from rlpatch.lora.fold import not_finite
from rlpatch.lora.target import Product, Target

logger = logging.getLogger("rlpatch")

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch come without it
    triton = None

BLOCK_ROWS, BLOCK_COLUMNS, WARPS = 128, 64, 8
_FOLD, _UNFOLD = 0, 1
_ABSENT, _NOT_FINITE = -1, -2  # a tile's state instead of a count
_FIRST_SHARE = 2e-4  # of the elements; grows with what folds turn out to need
_GROWTH = 1.1

if triton is not None:

    @triton.jit
    def _delta(
        left, right, left_row, left_rank, right_rank, right_column, rows, columns, rank, i, j,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, SPLIT: tl.constexpr,
    ):  # fmt: skip
        """``left @ right`` for rows `i` and columns `j`, in fp32."""
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for start in range(0, rank, RANK):
            k = start + tl.arange(0, RANK)
            a = tl.load(
                left + i.to(tl.int64)[:, None] * left_row + k[None, :] * left_rank,
                mask=(i < rows)[:, None] & (k < rank)[None, :],
                other=0.0,
            )
            b = tl.load(
                right + k[:, None] * right_rank + j.to(tl.int64)[None, :] * right_column,
                mask=(k < rank)[:, None] & (j < columns)[None, :],
                other=0.0,
            )
            if SPLIT:  # two bf16 terms per fp32 factor: 16 bits of precision at the speed of tensor cores
                a_high = a.to(tl.bfloat16)
                b_high = b.to(tl.bfloat16)
                a_low = (a - a_high.to(tl.float32)).to(tl.bfloat16)
                b_low = (b - b_high.to(tl.float32)).to(tl.bfloat16)
                total = tl.dot(a_low, b_high, total)
                total = tl.dot(a_high, b_low, total)
                total = tl.dot(a_high, b_high, total)
            else:
                total = tl.dot(a, b, total, input_precision="ieee")
        return total

    @triton.jit
    def _put_right(
        place, entry, valid, difference, first_row, first_column, row_stride, column_stride, local,
        COLUMNS: tl.constexpr,
    ):  # fmt: skip
        """Add `difference` to the bits of some elements of a tile; returns what that adds to the checksum."""
        row = first_row + local // COLUMNS
        column = first_column + local % COLUMNS
        place += row.to(tl.int64) * row_stride + column.to(tl.int64) * column_stride
        found = tl.load(place, mask=valid, other=0)
        right = (found.to(tl.int32) + difference).to(found.dtype)  # modulo the width of the element
        tl.store(place, right, mask=valid)
        weighted = tl.where(valid, (right.to(tl.int32) - found.to(tl.int32)) * ((2 * row + 1) * (2 * column + 1)), 0)
        return tl.sum(weighted.to(tl.int64), axis=0)

    @triton.jit(do_not_specialize=["number", "first_tile", "room", "long_room"])
    def _fold_kernel(
        source,
        target,
        left,
        right,
        state,  # int64 [tiles, 2]: per list 40 bits of start and 20 of count; or, in the first, a negative state
        entries,  # int16, short list: 13 bits of place in the tile, 3 of difference
        long_places,  # int16, long list
        long_differences,  # int32
        counters,  # int64 [4]: entries asked of the short and long list, tiles without room, tiles not finite
        sums,  # int64 [weights], counted modulo 2^32
        scale,
        rows,
        columns,
        source_row,
        source_column,
        target_row,
        target_column,
        left_row,
        left_rank,
        right_rank,
        right_column,
        rank,
        number,
        first_tile,
        room,
        long_room,
        MODE: tl.constexpr,
        SPLIT: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        RANK: tl.constexpr,
    ):
        NARROW: tl.constexpr = source.dtype.element_ty.primitive_bitwidth == 16
        BITS: tl.constexpr = tl.int16 if NARROW else tl.int32
        KEY: tl.constexpr = tl.int32 if NARROW else tl.int64
        SHIFT: tl.constexpr = 16 if NARROW else 32
        tile = tl.program_id(0)
        mine = state + (first_tile + tile).to(tl.int64) * 2
        known = tl.load(mine)
        # a fold runs on tiles that no earlier launch folded, an unfold on those that are folded
        if (MODE == 0) == (known == -1):
            across = tl.cdiv(columns, COLUMNS)
            first_row = (tile // across) * ROWS
            first_column = (tile % across) * COLUMNS
            i = first_row + tl.arange(0, ROWS)
            j = first_column + tl.arange(0, COLUMNS)
            inside = (i < rows)[:, None] & (j < columns)[None, :]
            i64 = i.to(tl.int64)[:, None]
            j64 = j.to(tl.int64)[None, :]
            write = i64 * target_row + j64 * target_column
            value = tl.load(source + i64 * source_row + j64 * source_column, mask=inside, other=0.0)
            delta = scale * _delta(
                left, right, left_row, left_rank, right_rank, right_column, rows, columns, rank, i, j,
                ROWS, COLUMNS, RANK, SPLIT,
            )  # fmt: skip
            if MODE == 0:
                folded = (value.to(tl.float32) + delta).to(value.dtype)
                back = (folded.to(tl.float32) - delta).to(value.dtype)
                bits = value.to(BITS, bitcast=True).to(tl.int32)
                lost = bits - back.to(BITS, bitcast=True).to(tl.int32)
                if NARROW:
                    lost = lost.to(tl.int16).to(tl.int32)  # a difference is added modulo 2^16
                differs = inside & (lost != 0)
                is_short = (lost >= -4) & (lost <= 4)
                packed = tl.where(differs, tl.where(is_short, 1, 65536), 0)
                per_row = tl.sum(packed, axis=1)
                counts = tl.sum(per_row, axis=0)
                shorts = (counts & 65535).to(tl.int64)
                longs = (counts >> 16).to(tl.int64)
                wide = folded.to(tl.float32)
                broken = tl.max(tl.max(tl.where(inside & ((wide - wide) != 0.0), 1, 0), axis=1), axis=0)
                base = tl.atomic_add(counters, shorts)
                long_base = tl.atomic_add(counters + 1, longs)
                one = shorts * 0 + 1
                if broken > 0:
                    tl.store(mine, -2)
                    tl.atomic_add(counters + 3, one)
                elif (base + shorts > room) | (long_base + longs > long_room):
                    tl.atomic_add(counters + 2, one)
                else:
                    tl.store(mine, (base << 20) + shorts)
                    tl.store(mine + 1, (long_base << 20) + longs)
                    tl.store(target + write, folded, mask=inside)
                    line = tl.sum(tl.where(inside, bits * (2 * j + 1)[None, :], 0), axis=1) * (2 * i + 1)
                    tl.atomic_add(sums + number, tl.sum(line.to(tl.int64), axis=0))
                    # The lost elements of each row, one after the other: few per row, so few rounds.
                    rounds = tl.max((per_row & 65535) + (per_row >> 16), axis=0)
                    last: tl.constexpr = COLUMNS << SHIFT
                    column = tl.arange(0, COLUMNS)[None, :].to(KEY)
                    if NARROW:
                        low = lost & 65535
                    else:
                        low = lost.to(tl.int64) & 4294967295
                    keys = tl.where(differs, (column << SHIFT) | low, last)
                    for _ in range(0, rounds):
                        first = tl.min(keys, axis=1)
                        keys = tl.where(keys == first[:, None], last, keys)
                        present = first < last
                        if NARROW:
                            difference = first.to(tl.int16).to(tl.int32)
                        else:
                            difference = first.to(tl.int32)
                        place = tl.arange(0, ROWS) * COLUMNS + (first >> SHIFT).to(tl.int32)
                        fits = present & (difference >= -4) & (difference <= 4)
                        code = tl.where(difference < 0, difference + 4, difference + 3)
                        order = tl.cumsum(fits.to(tl.int32), axis=0)
                        tl.store(entries + base + order - 1, (place * 8 + code).to(tl.int16), mask=fits)
                        base += tl.sum(fits.to(tl.int32), axis=0)
                        if longs > 0:
                            far = present & ((difference < -4) | (difference > 4))
                            order = tl.cumsum(far.to(tl.int32), axis=0)
                            tl.store(long_places + long_base + order - 1, place.to(tl.int16), mask=far)
                            tl.store(long_differences + long_base + order - 1, difference, mask=far)
                            long_base += tl.sum(far.to(tl.int32), axis=0)
            else:
                if known >= 0:
                    more = tl.load(mine + 1)
                    back = (value.to(tl.float32) - delta).to(value.dtype)
                    tl.store(target + write, back, mask=inside)
                    bits = back.to(BITS, bitcast=True).to(tl.int32)
                    line = tl.sum(tl.where(inside, bits * (2 * j + 1)[None, :], 0), axis=1) * (2 * i + 1)
                    result = tl.sum(line.to(tl.int64), axis=0)
                    place = target.to(tl.pointer_type(BITS))
                    tl.debug_barrier()  # the tile is written before its lost elements are put right
                    shorts = (known & 1048575).to(tl.int32)
                    for start in range(0, shorts, ROWS):
                        entry = start + tl.arange(0, ROWS)
                        valid = entry < shorts
                        packed = tl.load(entries + (known >> 20) + entry, mask=valid, other=0).to(tl.int32) & 65535
                        code = packed & 7
                        difference = tl.where(code < 4, code - 4, code - 3)
                        result += _put_right(
                            place, entry, valid, difference, first_row, first_column, target_row, target_column,
                            packed >> 3, COLUMNS,
                        )  # fmt: skip
                    longs = (more & 1048575).to(tl.int32)
                    for start in range(0, longs, ROWS):
                        entry = start + tl.arange(0, ROWS)
                        valid = entry < longs
                        local = tl.load(long_places + (more >> 20) + entry, mask=valid, other=0).to(tl.int32)
                        difference = tl.load(long_differences + (more >> 20) + entry, mask=valid, other=0)
                        result += _put_right(
                            place, entry, valid, difference, first_row, first_column, target_row, target_column,
                            local, COLUMNS,
                        )  # fmt: skip
                    tl.atomic_add(sums + number, result)


@functools.cache
def available() -> bool:
    """Whether Triton can compile for this GPU; when not, the fold runs in plain torch and says so once."""
    if triton is None:
        return False
    try:
        weight = torch.ones(16, 16, dtype=torch.float16, device="cuda")
        low = torch.ones(16, 16, device="cuda")
        passes = TritonPasses()
        passes.fold([Target("probe", weight, (Product(low, low, 1.0),))])
        return bool((weight == 17).all())
    except Exception as error:
        logger.warning("rlpatch: folding runs in plain torch, because Triton does not serve this GPU: %s", error)
        return False


class TritonPasses:
    """The passes on CUDA for weights of bf16, fp16 and fp32; see the module's docstring for what they keep."""

    def __init__(self) -> None:
        self._need = [0.0, 0.0]  # entries that the last fold asked for, as a share of the elements
        self._state: torch.Tensor | None = None
        self._lists: tuple[torch.Tensor, ...] = ()
        self._first_tile: list[int] = []
        self._packed: list[tuple[torch.Tensor, torch.Tensor, float]] = []
        self._kept = 0

    def fold(self, targets: Sequence[Target]) -> list[int]:
        """See `rlpatch.lora.fold.Passes`."""
        device = targets[0].weight.device
        self._packed = [_pack(target) for target in targets]
        self._first_tile = []
        tiles = 0
        for target in targets:
            self._first_tile.append(tiles)
            tiles += _tiles(target.weight)
        self._state = torch.full((tiles, 2), _ABSENT, dtype=torch.int64, device=device)
        sums = torch.zeros(len(targets), dtype=torch.int64, device=device)
        elements = sum(target.weight.numel() for target in targets)
        room = [max(1 << 14, int(elements * max(_FIRST_SHARE, _GROWTH * need))) for need in self._need]
        self._lists = _lists(room, device)
        used = [0, 0]
        while True:
            counters = torch.tensor([*used, 0, 0], dtype=torch.int64, device=device)
            for number, target in enumerate(targets):
                self._launch(_FOLD, number, target, target.weight, counters, sums, room)
            asked_short, asked_long, without_room, not_usable = counters.tolist()
            if not_usable:
                self._refuse(targets)
            if not without_room:
                break
            # What was filled lies below `room`; the launches that found none asked for the rest.
            grown = [
                have + max(0, asked - at) for have, asked, at in zip(room, (asked_short, asked_long), used, strict=True)
            ]
            larger = _lists(grown, device)
            for old, new in zip(self._lists, larger, strict=True):
                new[: len(old)].copy_(old)
            self._lists, used, room = larger, room, grown
        totals = (self._state & 0xFFFFF).sum(0).tolist()
        self._kept = sum(totals)
        self._need = [total / elements for total in totals]
        return [value & 0xFFFFFFFF for value in sums.tolist()]

    def _refuse(self, targets: Sequence[Target]) -> None:
        """Some tile holds what cannot be folded: undo the others, then name the weight."""
        assert self._state is not None
        where = int((self._state[:, 0] == _NOT_FINITE).nonzero()[0])
        number = max(n for n, first in enumerate(self._first_tile) if first <= where)
        self.unfold(targets)
        error: FoldError = not_finite(targets[number])
        self.forget()
        raise error

    def unfold(self, targets: Sequence[Target]) -> list[int]:
        """See `rlpatch.lora.fold.Passes`."""
        sums = torch.zeros(len(targets), dtype=torch.int64, device=targets[0].weight.device)
        for number, target in enumerate(targets):
            self._launch(_UNFOLD, number, target, target.weight, sums, sums, [0, 0])
        return [value & 0xFFFFFFFF for value in sums.tolist()]

    def original(self, index: int, target: Target) -> torch.Tensor:
        """See `rlpatch.lora.fold.Passes`."""
        sums = torch.zeros(index + 1, dtype=torch.int64, device=target.weight.device)
        copy = torch.empty_like(target.weight)
        self._launch(_UNFOLD, index, target, copy, sums, sums, [0, 0])
        return copy

    def kept(self) -> tuple[int, int]:
        """See `rlpatch.lora.fold.Passes`."""
        return self._kept, sum(t.nbytes for t in self._lists) + (0 if self._state is None else self._state.nbytes)

    def forget(self) -> None:
        """See `rlpatch.lora.fold.Passes`."""
        self._state, self._lists, self._packed, self._kept = None, (), [], 0

    def _launch(
        self,
        mode: int,
        number: int,
        target: Target,
        into: torch.Tensor,
        counters: torch.Tensor,
        sums: torch.Tensor,
        room: list[int],
    ) -> None:
        weight = target.weight
        left, right, scale = self._packed[number]
        if abs(weight.stride(1)) > abs(weight.stride(0)):  # the faster dimension last, for coalesced access
            weight, into, left, right = weight.T, into.T, right.T, left.T
        rows, columns = weight.shape
        rank = left.shape[1]
        _fold_kernel[(_tiles(weight),)](
            weight, into, left, right, self._state, *self._lists, counters, sums, scale, rows, columns,
            *weight.stride(), *into.stride(), *left.stride(), *right.stride(), rank, number, self._first_tile[number],
            *room, MODE=mode, SPLIT=_splits(weight), ROWS=BLOCK_ROWS, COLUMNS=BLOCK_COLUMNS,
            RANK=16 if rank <= 16 else 32, num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip


def _tiles(weight: torch.Tensor) -> int:
    rows, columns = weight.shape
    if abs(weight.stride(1)) > abs(weight.stride(0)):
        rows, columns = columns, rows
    return -(-rows // BLOCK_ROWS) * -(-columns // BLOCK_COLUMNS)


def _pack(target: Target) -> tuple[torch.Tensor, torch.Tensor, float]:
    """One fp32 product per weight: the adapter's own tensors where there is one in fp32, else a copy of all."""
    if len(target.products) == 1:
        product = target.products[0]
        return product.left.float(), product.right.float(), _float32(product.scale)
    left = torch.cat([product.left.float() * product.scale for product in target.products], 1)
    right = torch.cat([product.right.float() for product in target.products], 0)
    return left, right, 1.0


def _float32(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])


def _lists(room: list[int], device: torch.device) -> tuple[torch.Tensor, ...]:
    kinds = ((0, torch.int16), (1, torch.int16), (1, torch.int32))
    return tuple(torch.empty(room[which], dtype=dtype, device=device) for which, dtype in kinds)


def _splits(weight: torch.Tensor) -> bool:
    return weight.element_size() == 2 and _has_bf16(weight.device)


@functools.cache
def _has_bf16(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
