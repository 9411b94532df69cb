"""The fold's kernel; `rlpatch.lora.fold_kernel` launches it and says what it does.

It works on words of 32 bits: two elements of a row side by side where they have 16 bits (`PAIR`), else one.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _places(at, i, j, row, column, LARGE: tl.constexpr):
    if LARGE:
        found = at + i.to(tl.int64)[:, None] * row + j.to(tl.int64)[None, :] * column
    else:
        found = at + (i[:, None] * row + j[None, :] * column)
    return found


@triton.jit
def _inside(i, j, rows, columns):
    """Which of ``[i, j]`` the matrix has."""
    return (i < rows)[:, None] & (j < columns)[None, :]


@triton.jit
def _read(at, i, w, rows, columns, row, column, live, PAIR: tl.constexpr, WHOLE: tl.constexpr, EVEN: tl.constexpr,
          LARGE: tl.constexpr):  # fmt: skip
    """Words ``[i, w]``, where `live`; zeros beyond the matrix. Strides are in words if `WHOLE`, else in elements."""
    if WHOLE:
        if EVEN:
            words = tl.load(_places(at, i, w, row, column, LARGE), mask=live, other=0)
        else:
            inside = _inside(i, w * (2 if PAIR else 1), rows, columns)
            words = tl.load(_places(at, i, w, row, column, LARGE), mask=inside & live, other=0)
    else:
        first = _inside(i, 2 * w, rows, columns)
        second = _inside(i, 2 * w + 1, rows, columns)
        low = tl.load(_places(at, i, 2 * w, row, column, LARGE), mask=first & live, other=0)
        high = tl.load(_places(at, i, 2 * w + 1, row, column, LARGE), mask=second & live, other=0)
        words = (high.to(tl.int32) << 16) | (low.to(tl.int32) & 65535)
    return words


@triton.jit
def _write(words, at, i, w, rows, columns, row, column, PAIR: tl.constexpr, WHOLE: tl.constexpr, EVEN: tl.constexpr,
           LARGE: tl.constexpr):  # fmt: skip
    """The counterpart of `_read`."""
    if WHOLE:
        if EVEN:
            tl.store(_places(at, i, w, row, column, LARGE), words)
        else:
            inside = _inside(i, w * (2 if PAIR else 1), rows, columns)
            tl.store(_places(at, i, w, row, column, LARGE), words, mask=inside)
    else:
        first = _inside(i, 2 * w, rows, columns)
        second = _inside(i, 2 * w + 1, rows, columns)
        tl.store(_places(at, i, 2 * w, row, column, LARGE), words.to(tl.int16), mask=first)
        tl.store(_places(at, i, 2 * w + 1, row, column, LARGE), (words >> 16).to(tl.int16), mask=second)


@triton.jit
def _factor(at, rows, columns, i, k, EVEN: tl.constexpr):
    """Elements ``[i, k]`` of a contiguous ``[rows, columns]`` matrix."""
    places = at + i[:, None] * columns + k[None, :]
    if EVEN:
        found = tl.load(places)
    else:
        found = tl.load(places, mask=_inside(i, k, rows, columns), other=0.0)
    return found


@triton.jit
def _right(at, low, rank, width, k, w, PAIR: tl.constexpr, EVEN: tl.constexpr):
    """Rows `k` of the right factor for the words `w`: two terms for first elements, two for second ones."""
    b = _factor(at, rank, width, k, w, EVEN)
    b_low = _factor(low, rank, width, k, w, EVEN)
    b_high = b
    b_high_low = b_low
    if PAIR:
        b_high = _factor(at + rank * width, rank, width, k, w, EVEN)
        b_high_low = _factor(low + rank * width, rank, width, k, w, EVEN)
    return b, b_low, b_high, b_high_low


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
def _low(words, KIND: tl.constexpr):
    """fp32 of each word's first element."""
    if KIND == "bfloat16":
        return (words << 16).to(tl.float32, bitcast=True)
    elif KIND == "float16":
        return words.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return words.to(tl.float32, bitcast=True)


@triton.jit
def _high(words, KIND: tl.constexpr):
    """fp32 of each word's second element."""
    if KIND == "bfloat16":
        return (words & -65536).to(tl.float32, bitcast=True)
    else:
        return (words >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _rounded(wide, KIND: tl.constexpr):
    """fp32 values rounded to the element's type, to nearest even: its bits in the lower half of a word.

    bf16 is rounded on the bits, where what is not finite comes out wrong (`_unusable` sees it).
    """
    if KIND == "bfloat16":
        bits = wide.to(tl.int32, bitcast=True)
        return ((bits + 32767 + ((bits >> 16) & 1)) >> 16) & 65535
    else:
        return wide.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 65535


@triton.jit
def _words(low, high, KIND: tl.constexpr, NVIDIA: tl.constexpr):
    """The inverse of `_low` and `_high`, rounding; one instruction per word on NVIDIA Ampere and later."""
    if KIND == "float32":
        return low.to(tl.int32, bitcast=True)
    elif NVIDIA and KIND == "bfloat16":
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,r,r", [high, low], dtype=tl.int32, is_pure=True, pack=1
        )
    elif NVIDIA:
        return tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $1, $2;", "=r,r,r", [high, low], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return (_rounded(high, KIND) << 16) | _rounded(low, KIND)


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
def _ones(bits, NVIDIA: tl.constexpr):
    """How many bits are set."""
    if NVIDIA:
        return tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [bits], dtype=tl.int32, is_pure=True, pack=1)
    else:
        twos = (bits & 0x55555555) + ((bits >> 1) & 0x55555555)
        fours = (twos & 0x33333333) + ((twos >> 2) & 0x33333333)
        eights = (fours + (fours >> 4)) & 0x0F0F0F0F
        return (eights & 255) + ((eights >> 8) & 255) + ((eights >> 16) & 255) + (eights >> 24)


@triton.jit
def _second(words):
    """The bits of each word's second element."""
    return (words >> 16) & 65535


@triton.jit
def _weighted(words, second, w, PAIR: tl.constexpr):
    """What words `w` of a row add to the row's part of the checksum; differences of words and of `_second` as well."""
    if PAIR:  # of elements a, b: (4w + 1)·a + (4w + 3)·b, where a = word − 65536·b
        factor = 4 * w + 1
        return words * factor + second * (factor + 2 - (factor << 16))
    else:
        return words * (2 * w + 1)


@triton.jit
def _sum(words, i, w, PAIR: tl.constexpr):
    """`rlpatch.lora.fold.checksum` of these words of a matrix, int64."""
    line = tl.sum(_weighted(words, _second(words), w[None, :], PAIR), axis=1)
    return tl.sum((line * (2 * i + 1)).to(tl.int64), axis=0)


@triton.jit
def _near(lost, PAIR: tl.constexpr):
    """The difference that a code can stand for: of the second element if the first has none, else of the whole word."""
    if PAIR:
        return tl.where((lost & 65535) == 0, lost >> 16, lost)
    else:
        return lost


# Neither where a slice of the table begins nor what changes from step to step may have a kernel compiled anew.
@triton.jit(do_not_specialize=["addresses", "scales", "fields"])
def factors_kernel(
    addresses,  # int64 [weights, fields of the table]: of matrices [rows, columns] of `KIND`
    scales,  # fp32 [weights]
    into,  # bf16 [weights, 2, PARTS, rows, width] or fp32 [weights, 1, PARTS, rows, width]
    fields,
    rows,
    columns,
    row,
    column,
    width,  # columns of one part
    KIND: tl.constexpr,
    SCALED: tl.constexpr,
    PARTS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Factors as `fold_kernel` wants them: part p has every ``columns[p::PARTS]``; under `SPLIT` two bf16 terms each."""
    TERMS: tl.constexpr = 2 if SPLIT else 1
    ELEMENT: tl.constexpr = tl.bfloat16 if KIND == "bfloat16" else tl.float16 if KIND == "float16" else tl.float32
    weight = tl.program_id(1)
    source = tl.load(addresses + weight * fields).to(tl.pointer_type(ELEMENT))
    scale = tl.load(scales + weight)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    i = (place // width).to(tl.int64)
    first = place % width * PARTS
    size = rows * width
    here = into + weight.to(tl.int64) * (TERMS * PARTS * size) + place
    for part in tl.static_range(0, PARTS):
        j = first + part
        wide = tl.load(source + i * row + j * column, mask=(i < rows) & (j < columns), other=0.0).to(tl.float32)
        if SCALED:
            wide *= scale
        high = wide.to(into.dtype.element_ty)
        tl.store(here + part * size, high, mask=i < rows)
        if SPLIT:
            rest = wide - high.to(tl.float32)
            tl.store(here + (PARTS + part) * size, rest.to(into.dtype.element_ty), mask=i < rows)


@triton.jit(do_not_specialize=["table", "fields", "first_tile", "room"])
def fold_kernel(
    table,  # int64 [weights, fields]: number for `sums`; addresses of source and target
    left,  # bf16 [weights, 2, rows, rank] or fp32 [weights, 1, rows, rank], the scale multiplied in
    right,  # the same, [..., rank, columns]; if PAIR [..., 2, rank, columns / 2]: even columns, odd columns
    state,  # int64 [tiles]: start of the tile's words << 24 | far entries << 12 | entries; or negative
    words,  # int16: per tile its entries (place << 5 | half << 4 | code), then the differences that no code stands for
    counters,  # int64 [3]: words asked for, tiles without room, tiles not finite
    sums,  # int64 [numbers], counted modulo 2^32
    fields,
    rows,
    columns,
    source_row,
    source_column,
    target_row,
    target_column,
    rank,
    width,  # words in a row
    across,  # tiles in a row of tiles
    first_tile,
    room,
    MODE: tl.constexpr,
    KIND: tl.constexpr,
    WHOLE: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,
    LARGE: tl.constexpr,
    SPLIT: tl.constexpr,
    NVIDIA: tl.constexpr,
    CHECK: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    RANK: tl.constexpr,
    ONE: tl.constexpr,
    STRIP: tl.constexpr,
):
    PAIR: tl.constexpr = KIND != "float32"
    PARTS: tl.constexpr = 2 if PAIR else 1
    TERMS: tl.constexpr = 2 if SPLIT else 1
    BITS: tl.constexpr = tl.int32 if WHOLE else tl.int16
    weight = tl.program_id(1)
    column = tl.program_id(0) % across
    begin = tl.program_id(0) // across * STRIP
    down = tl.cdiv(rows, ROWS)
    end = tl.minimum(begin + STRIP, down)
    mine = state + first_tile + weight.to(tl.int64) * (down * across) + column
    row = table + weight * fields
    source = tl.load(row + 1).to(tl.pointer_type(BITS))
    target = tl.load(row + 2).to(tl.pointer_type(BITS))
    if ALIGNED:
        source = tl.multiple_of(source, 16)
        target = tl.multiple_of(target, 16)
    number = tl.load(row)
    left_at = left + weight.to(tl.int64) * (TERMS * rows * rank)
    left_low = left_at + (TERMS - 1) * rows * rank
    right_at = right + weight.to(tl.int64) * (TERMS * PARTS * rank * width)
    right_low = right_at + (TERMS - 1) * PARTS * rank * width
    lane = tl.arange(0, WORDS)
    w = column * WORDS + lane
    k = tl.arange(0, RANK)
    if ONE:
        b, b_low, b_high, b_high_low = _right(right_at, right_low, rank, width, k, w, PAIR, EVEN)
    zero = begin * 0
    # The next tile is read before this one is worked on.
    coming = _read(source, begin * ROWS + tl.arange(0, ROWS), w, rows, columns, source_row, source_column, zero == 0,
                   PAIR, WHOLE, EVEN, LARGE)  # fmt: skip
    if MODE > 0:
        known_next = tl.load(mine + begin * across)
    for at in range(begin, end):
        raw = coming
        i = at * ROWS + tl.arange(0, ROWS)
        following = at + 1 < end
        coming = _read(source, i + ROWS, w, rows, columns, source_row, source_column, following, PAIR, WHOLE, EVEN,
                       LARGE)  # fmt: skip
        here = mine + at * across
        if MODE == 0:
            mine_to_do = True
        else:
            known = known_next
            known_next = tl.load(here + across, mask=following, other=-1)
            if MODE == 1:  # folding again where there was no room
                mine_to_do = known == -1
            else:  # unfolding what is folded
                mine_to_do = known >= 0
        if mine_to_do:
            delta = tl.zeros((ROWS, WORDS), dtype=tl.float32)
            delta_high = tl.zeros((ROWS, WORDS), dtype=tl.float32)
            if ONE:
                a = _factor(left_at, rows, rank, i, k, EVEN)
                a_low = _factor(left_low, rows, rank, i, k, EVEN)
                delta = _product(delta, a, a_low, b, b_low, SPLIT)
                if PAIR:
                    delta_high = _product(delta_high, a, a_low, b_high, b_high_low, SPLIT)
            else:
                for start in range(0, rank, RANK):
                    a = _factor(left_at, rows, rank, i, start + k, EVEN)
                    a_low = _factor(left_low, rows, rank, i, start + k, EVEN)
                    b, b_low, b_high, b_high_low = _right(right_at, right_low, rank, width, start + k, w, PAIR, EVEN)
                    delta = _product(delta, a, a_low, b, b_low, SPLIT)
                    if PAIR:
                        delta_high = _product(delta_high, a, a_low, b_high, b_high_low, SPLIT)
            # Outside of the weight all is zero, so that nothing there differs or counts.
            if MODE < 2:
                total = _low(raw, KIND) + delta
                total_high = total
                if PAIR:
                    total_high = _high(raw, KIND) + delta_high
                folded = _words(total, total_high, KIND, NVIDIA)
                back = _low(folded, KIND) - delta
                if PAIR:
                    back = _words(back, _high(folded, KIND) - delta_high, KIND, NVIDIA)
                else:
                    back = _words(back, back, KIND, NVIDIA)
                lost = raw - back
                if not EVEN:
                    lost = tl.where(_inside(i, w * PARTS, rows, columns), lost, 0)
                bit = (zero + 1) << lane
                marks = tl.sum(tl.where(lost != 0, bit[None, :], 0), axis=1)
                is_far = (_near(lost, PAIR) + 7).to(tl.uint32, bitcast=True) > 15
                far_marks = tl.sum(tl.where(is_far, bit[None, :], 0), axis=1)
                count = _ones(marks, NVIDIA)
                per_row = count + (_ones(far_marks, NVIDIA) << 16)
                before = tl.cumsum(per_row, axis=0) - per_row
                counts = tl.sum(per_row, axis=0)
                entries = counts & 65535
                far = counts >> 16
                unusable = far * 0
                if CHECK:
                    unusable = _unusable(total, KIND)
                    if PAIR:
                        unusable += _unusable(total_high, KIND)
                elif far > 0:  # where the base is finite, a sum that is not comes back far from it
                    unusable = _unusable(_low(folded, KIND), KIND)
                    if PAIR:
                        unusable += _unusable(_high(folded, KIND), KIND)
                need = (entries + far * 2).to(tl.int64)
                base = need * 0
                if need > 0:
                    base = tl.atomic_add(counters, need, sem="relaxed")
                one = need * 0 + 1
                if unusable > 0:
                    tl.store(here, -2)
                    tl.atomic_add(counters + 2, one, sem="relaxed")
                elif base + need > room:
                    tl.store(here, -1)
                    tl.atomic_add(counters + 1, one, sem="relaxed")
                else:
                    _write(folded, target, i, w, rows, columns, target_row, target_column, PAIR, WHOLE, EVEN, LARGE)
                    tl.store(here, (base << 24) + (far.to(tl.int64) << 12) + entries)
                    tl.atomic_add(sums + number, _sum(raw, i, w, PAIR), sem="relaxed")
                    # The lost words of each row, one after the other: few per row, so few rounds.
                    rounds = tl.max(count, axis=0)
                    entry_at = words + base + (before & 65535)
                    far_at = words + base + entries + (before >> 16) * 2
                    for _ in range(0, rounds):
                        first = marks & -marks
                        marks = marks ^ first
                        value = tl.sum(tl.where(bit[None, :] == first[:, None], lost, 0), axis=1)
                        present = first != 0
                        near = _near(value, PAIR)
                        half = tl.where(near != value, 16, 0)
                        coded = (near + 7).to(tl.uint32, bitcast=True) <= 15
                        code = tl.where(coded, tl.where(near < 0, near + 8, near + 7), 0)
                        place = tl.arange(0, ROWS) * WORDS + _ones(first - 1, NVIDIA)
                        tl.store(entry_at, ((place << 5) | half | code).to(tl.int16), mask=present)
                        entry_at += 1
                        if far > 0:
                            stored = present & (coded == 0)
                            tl.store(far_at, value.to(tl.int16), mask=stored)
                            tl.store(far_at + 1, (value >> 16).to(tl.int16), mask=stored)
                            far_at += tl.where(stored, 2, 0)
            else:
                back = _low(raw, KIND) - delta
                if PAIR:
                    back = _words(back, _high(raw, KIND) - delta_high, KIND, NVIDIA)
                else:
                    back = _words(back, back, KIND, NVIDIA)
                if not EVEN:
                    back = tl.where(_inside(i, w * PARTS, rows, columns), back, 0)
                    if PAIR:
                        back = tl.where(_inside(i, w * PARTS + 1, rows, columns), back, back & 65535)
                _write(back, target, i, w, rows, columns, target_row, target_column, PAIR, WHOLE, EVEN, LARGE)
                result = _sum(back, i, w, PAIR)
                entries = (known & 4095).to(tl.int32)
                far = ((known >> 12) & 4095).to(tl.int32)
                base = words + (known >> 24)
                far_before = far * 0
                tl.debug_barrier()  # the tile is written before its lost elements are put right
                for start in range(0, entries, ROWS):
                    entry = start + tl.arange(0, ROWS)
                    valid = entry < entries
                    packed = tl.load(base + entry, mask=valid, other=8).to(tl.int32) & 65535
                    code = packed & 15
                    lost = tl.where(code < 8, code - 8, code - 7) << (packed & 16)
                    if far > 0:
                        stored = valid & (code == 0)
                        order = tl.cumsum(stored.to(tl.int32), axis=0)
                        far_at = base + entries + (far_before + order - 1) * 2
                        low = tl.load(far_at, mask=stored, other=0).to(tl.int32) & 65535
                        high = tl.load(far_at + 1, mask=stored, other=0).to(tl.int32)
                        lost = tl.where(stored, (high << 16) | low, lost)
                        far_before += tl.sum(stored.to(tl.int32), axis=0)
                    r = at * ROWS + (packed >> 5) // WORDS
                    c = column * WORDS + (packed >> 5) % WORDS
                    if WHOLE:
                        place = target + r.to(tl.int64) * target_row + c.to(tl.int64) * target_column
                        found = tl.load(place, mask=valid, other=0)
                        true = found + lost
                        tl.store(place, true, mask=valid)
                    else:
                        place = target + r.to(tl.int64) * target_row + (2 * c).to(tl.int64) * target_column
                        both = valid & (2 * c + 1 < columns)
                        found = tl.load(place, mask=valid, other=0).to(tl.int32) & 65535
                        found = found | (tl.load(place + target_column, mask=both, other=0).to(tl.int32) << 16)
                        true = found + lost
                        tl.store(place, true.to(tl.int16), mask=valid)
                        tl.store(place + target_column, (true >> 16).to(tl.int16), mask=both)
                    change = _weighted(true - found, _second(true) - _second(found), c, PAIR)
                    result += tl.sum(tl.where(valid, change * (2 * r + 1), 0).to(tl.int64), axis=0)
                tl.atomic_add(sums + number, result, sem="relaxed")
