"""The fold's Triton passes on CPU tensors, under Triton's interpreter; test_fold_kernel.py runs this file.

The interpreter casts to bf16 by truncation, so that values are compared with the torch path's where both are exact, and
otherwise by what they promise: the same bits after the round trip.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from rlpatch.errors import FoldError
from rlpatch.lora import fold_kernel
from rlpatch.lora.fold import ReversibleFold, checksum
from rlpatch.lora.fold_kernel import BLOCK_ROWS, BLOCK_WORDS, STRIP, TritonPasses, _Launch
from rlpatch.lora.target import Product, Target

INTEGER = {2: torch.int16, 4: torch.int32}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [
    (1, 1),
    (1, 70),
    (70, 1),
    (16, 16),
    (2 * BLOCK_ROWS, 2 * BLOCK_WORDS),  # whole tiles
    (BLOCK_ROWS + 3, 2 * BLOCK_WORDS + 6),  # words that are whole, tiles that are not
    (BLOCK_ROWS * STRIP + 3, 2 * BLOCK_WORDS + 5),  # more than one program
]

LAYOUTS = ["transposed", "sliced"]


def bits(tensor: Any) -> Any:
    return tensor.detach().contiguous().view(INTEGER[tensor.element_size()]).clone()


def same(targets: list[Target], before: list[Any]) -> bool:
    return all(torch.equal(bits(t.weight), b) for t, b in zip(targets, before, strict=True))


def laid_out(values: Any, layout: str) -> Any:
    rows, columns = values.shape
    if layout == "transposed":
        return values.T.contiguous().T
    if layout == "sliced":
        return torch.full((rows + 3, columns + 5), 7.0, dtype=values.dtype)[2:-1, 1:-4].copy_(values)
    return values.clone()


def target(
    rows: int = 40, columns: int = 50, dtype: Any = torch.bfloat16, *, name: str = "weight", seed: int = 0,
    delta: float = 1e-2, ranks: tuple[int, ...] = (4,), adapter_dtype: Any = torch.float32, layout: str = "plain",
) -> Target:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Any:
        return torch.randn(size, generator=generator)

    products = []
    for number, rank in enumerate(ranks):
        left, right = draw(rows, rank) * math.sqrt(delta), draw(rank, columns) * math.sqrt(delta) / math.sqrt(rank)
        products.append(Product(left.to(adapter_dtype), right.to(adapter_dtype), 1.5 + number, f"a{number}"))
    return Target(name, laid_out(draw(rows, columns).to(dtype), layout), tuple(products), name)


def triton_fold() -> ReversibleFold:
    return ReversibleFold(passes_for=lambda item: "triton")


def cycle(items: list[Target]) -> ReversibleFold:
    """There and back, with everything that every case promises."""
    before = [bits(item.weight) for item in items]
    values = [item.weight.clone() for item in items]
    fold = triton_fold()
    fold.fold(items)
    assert isinstance(fold._passes["triton"], TritonPasses)
    assert fold.checksums == {i.name: checksum(v) for i, v in zip(items, values, strict=True)}
    for item, value in zip(items, values, strict=True):
        total = value.double() + item.delta().double()
        size = value.double().abs()  # of everything that is added up: terms that cancel leave their rounding behind
        for product in item.products:
            size += abs(product.scale) * (product.left.double().abs() @ product.right.double().abs())
        # 2 ulp: the interpreter truncates where the hardware rounds to the nearest
        assert ((item.weight.double() - total).abs() <= 2 * torch.finfo(value.dtype).eps * size + 1e-6).all()
        assert torch.equal(bits(fold.original(item.weight)), bits(value))
    fold.unfold()  # its checksums are the kernel's own
    assert same(items, before)
    return fold


def test_the_host_works_while_the_device_folds() -> None:
    """Its work comes when every launch is out and nothing has been looked at; factors share memory that is kept."""
    items = [target(seed=1), target(60, 70, torch.float32, name="other", seed=2, ranks=(3,))]
    before = [bits(item.weight) for item in items]
    fold, seen = triton_fold(), []

    def work() -> None:
        seen.append([torch.equal(bits(item.weight), old) for item, old in zip(items, before, strict=True)])

    fold.fold(items, work)
    folded = [bits(item.weight) for item in items]
    fold.unfold(work)
    assert seen == [[False, False], [True, True]] and same(items, before)
    fold.fold(items)
    assert all(torch.equal(bits(item.weight), now) for item, now in zip(items, folded, strict=True))
    fold.unfold()
    assert same(items, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "layout"), [*((shape, "plain") for shape in SHAPES), *((SHAPES[-1], other) for other in LAYOUTS)]
)
def test_there_and_back(dtype: Any, shape: tuple[int, int], layout: str) -> None:
    cycle([target(*shape, dtype, layout=layout)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("ranks", "adapter_dtype"),
    [((1,), torch.float32), ((17,), torch.float32), ((40,), torch.bfloat16), ((3, 5), torch.bfloat16)],
)
def test_ranks_and_several_adapters(dtype: Any, ranks: tuple[int, ...], adapter_dtype: Any) -> None:
    cycle([target(dtype=dtype, ranks=ranks, adapter_dtype=adapter_dtype)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("delta", [1e-6, 1e-3, 1.0, 100.0])
def test_any_size_of_delta(dtype: Any, delta: float) -> None:
    cycle([target(dtype=dtype, delta=delta)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_and_subnormals(dtype: Any) -> None:
    item = target(dtype=dtype)
    info = torch.finfo(dtype)
    item.weight[:10] = 0.0
    item.weight[10:20] = -0.0
    item.weight[20:30, ::2] = info.smallest_normal / 4
    item.products[0].left[::3] = 0.0
    item.products[0].left[1::3] *= -0.0
    cycle([item])


def test_weights_of_many_shapes_at_once() -> None:
    shapes = [(20, 30), (30, 20), (20, 30), (70, 65), (1, 8), (20, 30)]
    items = [
        target(*shape, dtype, name=f"{shape}{dtype}{i}", seed=i, ranks=(2 + i % 3,))
        for i, shape in enumerate(shapes)
        for dtype in DTYPES
    ]
    cycle(items)


def test_experts() -> None:
    experts = torch.randn(3, 20, 40).bfloat16()
    before = bits(experts)
    items = []
    for number in range(3):
        low = target(20, 40, seed=number)
        items.append(Target(f"experts[{number}]", experts[number], low.products, "experts"))
    fold = triton_fold()
    fold.fold(items)
    assert not torch.equal(bits(experts), before)
    assert torch.equal(bits(fold.original(experts)), before)
    assert fold.original(torch.zeros(3, 20, 40)) is None
    fold.unfold()
    assert torch.equal(bits(experts), before)


def test_the_torch_path_folds_alike() -> None:
    """Values for which no sum is rounded: small integers."""
    generator = torch.Generator().manual_seed(0)
    low = [torch.randint(-3, 4, size, generator=generator).float() for size in ((90, 3), (3, 70))]
    values = torch.randint(-9, 10, (90, 70), generator=generator).bfloat16()
    folded = []
    for kind in ("triton", "torch"):
        item = Target("weight", values.clone(), (Product(low[0], low[1], 2.0),))
        fold = ReversibleFold(passes_for=lambda item, kind=kind: kind)
        fold.fold([item])
        folded.append(item.weight.clone())
        fold.unfold()
        assert torch.equal(bits(item.weight), bits(values))
    assert torch.equal(*folded) and not torch.equal(folded[0], values)


@pytest.fixture
def little_room(monkeypatch: pytest.MonkeyPatch) -> int:
    """Words that the first launch has room for: few, because the interpreter is slow."""
    monkeypatch.setattr(fold_kernel, "_LEAST_ROOM", 1 << 10)
    return 1 << 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_room_grows_when_much_is_lost(little_room: int, dtype: Any) -> None:
    """Deltas that dwarf the weights: nearly every element is kept, in more words than the first launch has room for."""
    items = [target(24, 40, dtype, name=f"weight{i}", seed=i, delta=1e3) for i in range(2)]
    before = [bits(item.weight) for item in items]
    fold = triton_fold()
    report = fold.fold(items)
    assert report.kept > 0.5 * report.elements / (4 // dtype.itemsize)
    assert report.kept_bytes > 2 * little_room, "the first launch had room for all: this is no test"
    fold.unfold()
    assert same(items, before)
    again = fold.fold(items)
    assert again.kept == report.kept
    fold.unfold()
    assert same(items, before) and fold._passes["triton"].kept() == (0, 0)


class Full:
    """No memory from the `failing`-th launch on, as often as `times`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failing: int, times: int = 1) -> None:
        self.number, self.times, original = 0, times, _Launch.__call__

        def launch(this: Any, *args: Any) -> None:
            self.number += 1
            if self.number >= failing and self.times:
                self.times -= 1
                raise torch.OutOfMemoryError("CUDA out of memory")
            original(this, *args)

        monkeypatch.setattr(_Launch, "__call__", launch)


@pytest.mark.parametrize("failing", [1, 2, 3, 4])
def test_memory_that_ends_in_the_fold_leaves_nothing_folded(
    monkeypatch: pytest.MonkeyPatch, little_room: int, failing: int
) -> None:
    """In the first round of launches, and in the second, for which room was short."""
    items = [target(33, 40, delta=1e3), target(25, 40, torch.float32, name="other", seed=1, delta=1e3)]
    before = [bits(item.weight) for item in items]
    fold = triton_fold()
    full = Full(monkeypatch, failing)
    with pytest.raises(torch.OutOfMemoryError):
        fold.fold(items)
    assert not full.times and not fold.folded and same(items, before)
    fold.fold(items)
    fold.unfold()
    assert same(items, before)


@pytest.mark.parametrize("failing", [1, 2])
def test_memory_that_ends_in_the_unfold(monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    """The host's work (the KV cache goes) comes first then, and the unfold goes on where it was."""
    items = [target(seed=1), target(60, 70, torch.float32, name="other", seed=2)]
    before = [bits(item.weight) for item in items]
    fold, calls = triton_fold(), []
    fold.fold(items)
    full = Full(monkeypatch, failing)
    fold.unfold(lambda: calls.append([fold.folded, torch.equal(bits(items[0].weight), before[0])]))
    assert calls == [[True, failing == 2]] and not full.times and not fold.folded and same(items, before)
    fold.fold(items)
    full.number, full.times = 0, 2  # not even without the KV cache
    with pytest.raises(torch.OutOfMemoryError):
        fold.unfold()
    assert fold.folded
    for item, old in zip(items, before, strict=True):  # a checkpoint written now is right
        assert torch.equal(bits(fold.original(item.weight)), old)
    fold.unfold()
    assert not fold.folded and same(items, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("value", "where"), [(math.inf, "base"), (math.nan, "base"), (-math.inf, "left"), (math.nan, "right")]
)
def test_infinities_and_nan_are_refused(dtype: Any, value: float, where: str) -> None:
    items = [target(70, 70, dtype, name=f"weight{i}", seed=i) for i in range(3)]
    tensor = items[1].weight if where == "base" else getattr(items[1].products[0], where)
    tensor[-1, -1] = value
    before = [bits(item.weight) for item in items]
    fold = triton_fold()
    with pytest.raises(FoldError, match=r"^weight1: (the base|base \+ adapter) has values that are not finite"):
        fold.fold(items)
    assert not fold.folded and same(items, before)
    fold.fold([items[0], items[2]])
    fold.unfold()
    assert same(items, before)


def test_a_refusal_while_room_is_short(little_room: int) -> None:
    items = [target(33, 40, name=f"weight{i}", seed=i, delta=1e3) for i in range(3)]
    items[2].weight[-1, -1] = math.nan
    before = [bits(item.weight) for item in items]
    with pytest.raises(FoldError, match=r"^weight2: the base"):
        triton_fold().fold(items)
    assert same(items, before)


def test_overflow_is_refused() -> None:
    items = [target(dtype=torch.float16, name=f"weight{i}", seed=i) for i in range(2)]
    items[1].weight[3, 4] = 65504.0
    items[1].products[0].left[3] = 100.0
    items[1].products[0].right[:, 4] = 1.0
    before = [bits(item.weight) for item in items]
    with pytest.raises(FoldError, match=r"^weight1: base \+ adapter"):
        triton_fold().fold(items)
    assert same(items, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("what", ["weight", "left", "right"])
def test_a_write_between_is_noticed_or_does_no_harm(dtype: Any, what: str) -> None:
    """A write to an adapter does none where the passes work on a copy of it."""
    items = [target(dtype=dtype, name=f"weight{i}", seed=i) for i in range(2)]
    before = [bits(item.weight) for item in items]
    fold = triton_fold()
    fold.fold(items)
    tensor = items[1].weight if what == "weight" else getattr(items[1].products[0], what)
    tensor[2, 1] += 1
    try:
        fold.unfold()
    except FoldError as error:
        assert str(error).startswith("weight1 did not unfold")
        assert same([items[0]], [before[0]])
        with pytest.raises(FoldError, match=r"^weight1 did not unfold"):
            fold.fold([items[0]])
    else:
        assert what != "weight"
        assert same(items, before)


def test_public_methods() -> None:
    items = [target(40, 50, name="a", delta=0.5), target(60, 70, torch.float32, name="b", seed=1)]
    before = [item.weight.clone() for item in items]
    passes = TritonPasses()
    assert passes.fold(items) == [checksum(value) for value in before]
    assert passes.kept()[0] > 0 and passes.kept()[1] > 0
    for number, item in enumerate(items):
        folded = bits(item.weight)
        assert torch.equal(bits(passes.original(number, item)), bits(before[number]))
        assert torch.equal(bits(item.weight), folded)
    assert passes.unfold(items) == [checksum(value) for value in before]
    passes.forget()
    assert passes.kept() == (0, 0)
