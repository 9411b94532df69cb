"""The fold's kernel; `rlpatch.lora.fold_kernel` launches it and says what it does."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _factor(at, rows, columns, i, k, EVEN: tl.constexpr):
    """Elements ``[i, k]`` of a contiguous ``[rows, columns]`` matrix."""
    places = at + i[:, None] * columns + k[None, :]
    if EVEN:
        found = tl.load(places)
    else:
        found = tl.load(places, mask=(i < rows)[:, None] & (k < columns)[None, :], other=0.0)
    return found


@triton.jit
def _product(total, a, a_low, b, b_low, SPLIT: tl.constexpr):
    """``total + a @ b`` in fp32; under `SPLIT` each factor is the sum of two bf16 terms."""
    if SPLIT:
        total = tl.dot(a_low, b, total)
        total = tl.dot(a, b_low, total)
        total = tl.dot(a, b, total)
    else:
        total = tl.dot(a, b, total, input_precision="ieee")
    return total


@triton.jit
def _wide(raw, KIND: tl.constexpr):
    """fp32 of an element's bits."""
    if KIND == "bfloat16":
        return (raw.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif KIND == "float16":
        return raw.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return raw.to(tl.float32, bitcast=True)


@triton.jit
def _rounded(wide, KIND: tl.constexpr, PACK: tl.constexpr):
    """fp32 values rounded to the element's type, to nearest even: its bits, as integers of its width.

    Under `PACK` one instruction rounds two bf16 values (NVIDIA Ampere and later); else they are rounded on the bits,
    where what is not finite comes out wrong (`_unusable` sees it).
    """
    if KIND == "bfloat16":
        if PACK:
            return tl.inline_asm_elementwise(
                "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [wide], dtype=tl.int16, is_pure=True, pack=2
            )
        else:
            u = wide.to(tl.int32, bitcast=True)
            return ((u + 32767 + ((u >> 16) & 1)) >> 16).to(tl.int16)
    elif KIND == "float16":
        return wide.to(tl.float16).to(tl.int16, bitcast=True)
    else:
        return wide.to(tl.int32, bitcast=True)


@triton.jit
def _unusable(wide, KIND: tl.constexpr):
    """Whether any value is not finite once it is rounded to the element's type."""
    size = wide.to(tl.int32, bitcast=True) & 2147483647
    if KIND == "bfloat16":
        limit = 2139062272  # 0x7F7F8000: rounds to infinity
    elif KIND == "float16":
        limit = 1199566848  # 65520.0
    else:
        limit = 2139095040  # infinity
    return tl.where(tl.max(tl.max(size, axis=1), axis=0) >= limit, 1, 0)


@triton.jit
def fold_kernel(
    table,  # int64 [weights, 3]: addresses of source and target; number for `sums`
    left,  # bf16 [weights, 2, rows, rank] or fp32 [weights, 1, rows, rank], the scale multiplied in
    right,  # the same, [..., rank, columns]
    state,  # int64 [tiles]: start of the tile's words << 28 | far entries << 14 | entries; or negative
    words,  # int16: per tile its entries (place << 4 | code), then the differences that no code stands for
    counters,  # int64 [3]: words asked for, tiles without room, tiles not finite
    sums,  # int64 [numbers], counted modulo 2^32
    rows,
    columns,
    source_row,
    source_column,
    target_row,
    target_column,
    rank,
    first_tile,
    room,
    MODE: tl.constexpr,
    KIND: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,
    LARGE: tl.constexpr,
    SPLIT: tl.constexpr,
    PACK: tl.constexpr,
    CHECK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
):
    NARROW: tl.constexpr = KIND != "float32"
    BITS: tl.constexpr = tl.int16 if NARROW else tl.int32
    KEY: tl.constexpr = tl.int32 if NARROW else tl.int64
    SHIFT: tl.constexpr = 16 if NARROW else 32
    FAR_WORDS: tl.constexpr = 1 if NARROW else 2
    UNIT: tl.constexpr = 65536 if NARROW else 1  # a difference of one: 16 bits stand in the upper half, and wrap there
    LAST: tl.constexpr = COLUMNS << SHIFT
    TERMS: tl.constexpr = 2 if SPLIT else 1
    tile = tl.program_id(0)
    weight = tl.program_id(1)
    mine = state + first_tile + weight.to(tl.int64) * tl.num_programs(0) + tile
    if MODE == 0:
        mine_to_do = True
    else:  # folding again where there was no room, unfolding what is folded
        known = tl.load(mine)
        mine_to_do = (known == -1) if MODE == 1 else (known >= 0)
    if mine_to_do:
        row = table + weight * 3
        source = tl.load(row).to(tl.pointer_type(BITS))
        target = tl.load(row + 1).to(tl.pointer_type(BITS))
        if ALIGNED:
            source = tl.multiple_of(source, 16)
            target = tl.multiple_of(target, 16)
        number = tl.load(row + 2)
        across = tl.cdiv(columns, COLUMNS)
        first_row = (tile // across) * ROWS
        first_column = (tile % across) * COLUMNS
        i = first_row + tl.arange(0, ROWS)
        j = first_column + tl.arange(0, COLUMNS)
        if LARGE:
            read = source + i.to(tl.int64)[:, None] * source_row + j.to(tl.int64)[None, :] * source_column
            write = target + i.to(tl.int64)[:, None] * target_row + j.to(tl.int64)[None, :] * target_column
        else:
            read = source + (i[:, None] * source_row + j[None, :] * source_column)
            write = target + (i[:, None] * target_row + j[None, :] * target_column)
        inside = (i < rows)[:, None] & (j < columns)[None, :]
        if EVEN:
            raw = tl.load(read)
        else:
            raw = tl.load(read, mask=inside, other=0)
        delta = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        left_at = left + weight.to(tl.int64) * (TERMS * rows * rank)
        right_at = right + weight.to(tl.int64) * (TERMS * rank * columns)
        for start in range(0, rank, RANK):
            k = start + tl.arange(0, RANK)
            b = _factor(right_at, rank, columns, k, j, EVEN)
            b_low = _factor(right_at + (TERMS - 1) * rank * columns, rank, columns, k, j, EVEN)
            a = _factor(left_at, rows, rank, i, k, EVEN)
            a_low = _factor(left_at + (TERMS - 1) * rows * rank, rows, rank, i, k, EVEN)
            delta = _product(delta, a, a_low, b, b_low, SPLIT)
        value = _wide(raw, KIND)  # outside of the weight all is zero, so that nothing there differs or counts
        if MODE < 2:
            total = value + delta
            folded = _rounded(total, KIND, PACK)
            back = _rounded(_wide(folded, KIND) - delta, KIND, PACK)
            if NARROW:
                lost = (raw.to(tl.int32) << 16) - (back.to(tl.int32) << 16)
            else:
                lost = raw - back
            if not EVEN:
                lost = tl.where(inside, lost, 0)
            is_far = (lost + 7 * UNIT).to(tl.uint32, bitcast=True) > 15 * UNIT
            per_row = tl.sum(tl.where(lost != 0, 1, 0) + tl.where(is_far, 65536, 0), axis=1)
            line = tl.sum(raw.to(tl.int32) * (2 * j + 1)[None, :], axis=1) * (2 * i + 1)
            before = tl.cumsum(per_row, axis=0) - per_row
            counts = tl.sum(per_row, axis=0)
            entries = counts & 65535
            far = counts >> 16
            unusable = far * 0
            if CHECK:
                unusable = _unusable(total, KIND)
            elif far > 0:  # where the base is finite, a sum that is not comes back far from it
                unusable = _unusable(_wide(folded, KIND), KIND)
            need = (entries + far * FAR_WORDS).to(tl.int64)
            base = need * 0
            if need > 0:
                base = tl.atomic_add(counters, need, sem="relaxed")
            one = need * 0 + 1
            if unusable > 0:
                tl.store(mine, -2)
                tl.atomic_add(counters + 2, one, sem="relaxed")
            elif base + need > room:
                tl.store(mine, -1)
                tl.atomic_add(counters + 1, one, sem="relaxed")
            else:
                if EVEN:
                    tl.store(write, folded)
                else:
                    tl.store(write, folded, mask=inside)
                tl.store(mine, (base << 28) + (far.to(tl.int64) << 14) + entries)
                tl.atomic_add(sums + number, tl.sum(line.to(tl.int64), axis=0), sem="relaxed")
                # The lost elements of each row, one after the other: few per row, so few rounds.
                rounds = tl.max(per_row & 65535, axis=0)
                column = tl.arange(0, COLUMNS)[None, :].to(KEY)
                if NARROW:
                    low = (lost >> 16) & 65535
                else:
                    low = lost.to(tl.int64) & 4294967295
                keys = tl.where(lost != 0, (column << SHIFT) | low, LAST)
                at = words + base + (before & 65535)
                far_at = words + base + entries + (before >> 16) * FAR_WORDS
                for _ in range(0, rounds):
                    first = tl.min(keys, axis=1)
                    keys = tl.where(keys == first[:, None], LAST, keys)
                    present = first < LAST
                    if NARROW:
                        difference = (first << 16) >> 16
                    else:
                        difference = first.to(tl.int32)
                    place = tl.arange(0, ROWS) * COLUMNS + (first >> SHIFT).to(tl.int32)
                    coded = (difference >= -7) & (difference <= 8)
                    code = tl.where(coded, tl.where(difference < 0, difference + 8, difference + 7), 0)
                    tl.store(at, ((place << 4) | code).to(tl.int16), mask=present)
                    at += 1
                    if far > 0:
                        writes = present & (coded == 0)
                        tl.store(far_at, difference.to(tl.int16), mask=writes)
                        if FAR_WORDS == 2:
                            tl.store(far_at + 1, (difference >> 16).to(tl.int16), mask=writes)
                        far_at += tl.where(writes, FAR_WORDS, 0)
        else:
            back = _rounded(value - delta, KIND, PACK)
            if EVEN:
                tl.store(write, back)
            else:
                tl.store(write, back, mask=inside)
                back = tl.where(inside, back, 0)
            line = tl.sum(back.to(tl.int32) * (2 * j + 1)[None, :], axis=1) * (2 * i + 1)
            result = tl.sum(line.to(tl.int64), axis=0)
            entries = (known & 16383).to(tl.int32)
            far = ((known >> 14) & 16383).to(tl.int32)
            base = words + (known >> 28)
            far_before = far * 0
            tl.debug_barrier()  # the tile is written before its lost elements are put right
            for start in range(0, entries, ROWS):
                entry = start + tl.arange(0, ROWS)
                valid = entry < entries
                packed = tl.load(base + entry, mask=valid, other=8).to(tl.int32) & 65535
                code = packed & 15
                difference = tl.where(code < 8, code - 8, code - 7)
                if far > 0:
                    reads = valid & (code == 0)
                    order = tl.cumsum(reads.to(tl.int32), axis=0)
                    far_at = base + entries + (far_before + order - 1) * FAR_WORDS
                    stored = tl.load(far_at, mask=reads, other=0).to(tl.int32)
                    if FAR_WORDS == 2:
                        high = tl.load(far_at + 1, mask=reads, other=0).to(tl.int32)
                        stored = (stored & 65535) | (high << 16)
                    difference = tl.where(reads, stored, difference)
                    far_before += tl.sum(reads.to(tl.int32), axis=0)
                r = first_row + (packed >> 4) // COLUMNS
                c = first_column + (packed >> 4) % COLUMNS
                place = target + r.to(tl.int64) * target_row + c.to(tl.int64) * target_column
                found = tl.load(place, mask=valid, other=0)
                true = (found.to(tl.int32) + difference).to(BITS)  # modulo the width of the element
                tl.store(place, true, mask=valid)
                change = (true.to(tl.int32) - found.to(tl.int32)) * ((2 * r + 1) * (2 * c + 1))
                result += tl.sum(tl.where(valid, change, 0).to(tl.int64), axis=0)
            tl.atomic_add(sums + number, result, sem="relaxed")
