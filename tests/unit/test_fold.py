"""The reversible fold: the base comes back bit for bit, whatever its shape, dtype, strides and values."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from rlpatch.errors import FoldError, StandbyError  # noqa: E402
from rlpatch.lora import fold as fold_module  # noqa: E402
from rlpatch.lora.fold import ReversibleFold, TorchPasses, checksum, kind_of  # noqa: E402
from rlpatch.lora.target import Product, Target  # noqa: E402

INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def bits(tensor: Any) -> Any:
    """A copy of the elements' bits: equal ones are equal down to the sign of a zero."""
    return tensor.detach().contiguous().view(INTEGER[tensor.element_size()]).clone()


def same(targets: list[Target], before: list[Any]) -> bool:
    return all(torch.equal(bits(t.weight), b) for t, b in zip(targets, before, strict=True))


def laid_out(values: Any, layout: str) -> Any:
    """`values` in memory of another layout."""
    rows, columns = values.shape
    if layout == "transposed":
        return values.T.contiguous().T
    if layout == "sliced":
        around = torch.full((rows + 3, columns + 5), 7.0, dtype=values.dtype)
        view = around[2 : 2 + rows, 1 : 1 + columns]
    elif layout == "every-other":
        view = torch.full((2 * rows, 3 * columns), 7.0, dtype=values.dtype)[::2, ::3]
    else:
        return values.clone()
    return view.copy_(values)


def target(
    rows: int = 12,
    columns: int = 10,
    dtype: Any = torch.bfloat16,
    *,
    name: str = "model.layers.0.q_proj.weight",
    seed: int = 0,
    delta: float = 1e-2,
    ranks: tuple[int, ...] = (4,),
    adapter_dtype: Any = torch.float32,
    layout: str = "plain",
    weight: Any = None,
) -> Target:
    """A weight of size 1 and adapters that change it by about `delta`."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Any:
        return torch.randn(size, generator=generator)

    products = []
    for number, rank in enumerate(ranks):
        left, right = draw(rows, rank) * math.sqrt(delta), draw(rank, columns) * math.sqrt(delta) / math.sqrt(rank)
        products.append(Product(left.to(adapter_dtype), right.to(adapter_dtype), 1.0 + number / 2, f"a{number}"))
    values = draw(rows, columns).to(dtype) if weight is None else weight
    return Target(name, laid_out(values, layout), tuple(products), name)


def exact(item: Target, weight: Any) -> tuple[Any, Any]:
    """``weight + delta`` in fp64, and the size of the terms that were added, both apart from the code under test."""
    value, size = weight.double(), weight.double().abs()
    for product in item.products:
        left, right = product.left.double(), product.right.double()
        value = value + product.scale * (left @ right)
        size = size + abs(product.scale) * (left.abs() @ right.abs())
    return value, size


def ulp(value: Any, dtype: Any) -> Any:
    info = torch.finfo(dtype)
    return torch.exp2(value.abs().clamp(min=info.smallest_normal).log2().floor()) * info.eps


def assert_merged(item: Target, before: Any) -> None:
    """At most 1 ulp away from the exact sum, beside what sums of that many terms of that size lose in fp32 (fp64)."""
    dtype = item.weight.dtype
    value, size = exact(item, before)
    arithmetic = 2.0 ** (-52 if dtype == torch.float64 else -23)
    terms = sum(product.rank for product in item.products) + 3
    allowed = ulp(value, dtype) * 1.001 + terms * arithmetic * size + terms * 1e-38  # products below fp32's range
    wrong = (item.weight.double() - value).abs() > allowed
    assert not wrong.any(), f"{item.weight[wrong][:4]} is not {value[wrong][:4]}"


SPECIAL = ("zero", "minus-zero", "subnormal", "smallest", "large")


@st.composite
def targets(draw: Any) -> list[Target]:
    """One to three weights of one model with their adapters."""
    found = []
    for number in range(draw(st.integers(1, 3))):
        dtype = draw(st.sampled_from(DTYPES))
        rows, columns = draw(st.integers(1, 33)), draw(st.integers(1, 33))
        ranks = tuple(draw(st.lists(st.integers(1, 9), max_size=3)))
        delta = 10.0 ** draw(st.integers(-6, 3))
        adapter_dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
        seed = draw(st.integers(0, 1 << 16))
        layout = draw(st.sampled_from(["plain", "transposed", "sliced", "every-other"]))
        item = target(
            rows, columns, dtype, name=f"weight{number}", seed=seed, delta=delta, ranks=ranks,
            adapter_dtype=adapter_dtype, layout=layout,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(seed + 1)
        info = torch.finfo(dtype)
        special = {
            "zero": 0.0,
            "minus-zero": -0.0,
            "subnormal": info.smallest_normal / 4,
            "smallest": info.smallest_normal * info.eps,
            "large": info.max / 1024,
        }
        for kind in draw(st.sets(st.sampled_from(SPECIAL))):
            item.weight[torch.rand(rows, columns, generator=generator) < 0.2] = special[kind]
        for product in item.products:
            if draw(st.booleans()):
                for factor in (product.left, product.right):
                    factor[torch.rand(factor.shape, generator=generator) < 0.3] = draw(
                        st.sampled_from([0.0, -0.0, 1e-39])
                    )
        found.append(item)
    return found


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(targets(), st.sampled_from([1, 50, 1 << 24]))
def test_there_and_back(items: list[Target], chunk: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fold_module, "_CHUNK", chunk)  # some rows at a time, as large weights
        before = [bits(item.weight) for item in items]
        values = [item.weight.clone() for item in items]
        adapters = [copy.deepcopy(item.products) for item in items]
        fold = ReversibleFold()
        try:
            report = fold.fold(items)
        except FoldError as error:
            assert same(items, before)
            name = str(error).split(":")[0]
            at = [item.name for item in items].index(name)
            value, size = exact(items[at], values[at])
            assert (size.abs() > torch.finfo(items[at].weight.dtype).max * 0.99).any(), "nothing leaves its range"
            return
        assert fold.folded
        for item, value in zip(items, values, strict=True):
            assert_merged(item, value)
            assert torch.equal(bits(fold.original(item.weight)), bits(value))
        assert report.weights == len(items) and report.elements == sum(item.weight.numel() for item in items)
        assert {name: checksum(v) for name, v in zip((i.name for i in items), values, strict=True)} == fold.checksums
        fold.unfold()
        assert not fold.folded and fold.cycles == 1
        assert same(items, before)
        for item, old in zip(items, adapters, strict=True):
            for product, kept in zip(item.products, old, strict=True):
                assert torch.equal(product.left, kept.left) and torch.equal(product.right, kept.right)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_cycles_leave_no_trace(dtype: Any) -> None:
    items = [
        target(40, 30, dtype, seed=3, delta=0.3),
        target(1, 1, dtype, name="one"),
        target(1, 64, dtype, name="row"),
    ]
    before = [bits(item.weight) for item in items]
    fold = ReversibleFold()
    for cycle in range(20):
        fold.fold(items)
        fold.unfold()
        assert same(items, before), f"cycle {cycle}"
        with torch.no_grad():
            for item in items:
                item.products[0].left.mul_(-1.1)


def test_a_plain_unmerge_would_leave_a_trace() -> None:
    """What the fold is for: without what it keeps, bf16 weights differ after a merge and unmerge."""
    item = target(64, 64, torch.bfloat16)
    before = item.weight.clone()
    delta = item.delta()
    unmerged = ((before.float() + delta).bfloat16().float() - delta).bfloat16()
    lost = int((bits(unmerged) != bits(before)).sum())
    fold = ReversibleFold()
    assert lost > 0 and fold.fold([item]).kept == lost


def test_neighbours_of_a_view_are_left_alone() -> None:
    around = torch.full((20, 20), 3.0, dtype=torch.bfloat16)
    item = dataclasses.replace(target(8, 6), weight=around[4:12, 5:11])
    fold = ReversibleFold()
    fold.fold([item])
    outside = torch.ones(20, 20, dtype=torch.bool)
    outside[4:12, 5:11] = False
    assert (around[outside] == 3).all() and not (around[4:12, 5:11] == 3).all()
    fold.unfold()
    assert (around == 3).all()


def test_nothing_to_fold() -> None:
    fold = ReversibleFold()
    fold.fold([])
    assert fold.folded and fold.original(torch.zeros(3, 3)) is None
    fold.unfold()
    assert not fold.folded and fold.cycles == 1


def test_autocast_changes_nothing() -> None:
    """Whoever asks within autocast (a trainer's forward) gets the same bits."""
    outside, inside = target(dtype=torch.float32), target(dtype=torch.float32)
    before = bits(outside.weight)
    folds = ReversibleFold(), ReversibleFold()
    folds[0].fold([outside])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        folds[1].fold([inside])
        assert torch.equal(bits(folds[0].original(outside.weight)), before)
    assert torch.equal(outside.weight, inside.weight)
    folds[1].unfold()
    assert torch.equal(bits(inside.weight), before)


# ---- values that cannot be folded ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("where", ["base", "left", "right"])
@pytest.mark.parametrize("chunk", [10, 1 << 24])
def test_infinities_and_nan_are_refused(
    dtype: Any, value: float, where: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fold_module, "_CHUNK", chunk)
    items = [target(dtype=dtype, name=f"weight{i}", seed=i, ranks=(3, 2)) for i in range(3)]
    tensor = items[1].weight if where == "base" else getattr(items[1].products[1], where)
    tensor[-1, -1] = value
    before = [bits(item.weight) for item in items]
    fold = ReversibleFold()
    with pytest.raises(
        FoldError, match=r"^weight1: (the base|base \+ adapter) has values that are not finite"
    ) as caught:
        fold.fold(items)
    assert ("the base has" in str(caught.value)) == (where == "base")
    assert not fold.folded and same(items, before)
    fold.fold([items[0], items[2]])  # the next one works
    fold.unfold()
    assert same(items, before)


def test_overflow_is_refused() -> None:
    items = [target(dtype=torch.float16, name=f"weight{i}", seed=i) for i in range(2)]
    items[1].weight[3, 4] = 65504.0
    items[1].products[0].left[3] = 100.0
    items[1].products[0].right[:, 4] = 1.0
    before = [bits(item.weight) for item in items]
    with pytest.raises(FoldError, match=r"^weight1: base \+ adapter .*float16.*lora_alpha"):
        ReversibleFold().fold(items)
    assert same(items, before)


# ---- errors midway -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", range(9))
@pytest.mark.parametrize("error", [RuntimeError, MemoryError, KeyboardInterrupt])
def test_an_error_midway_leaves_nothing_folded(
    failing: int, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three weights in three pieces each; the delta of one piece cannot be made, however often it is tried."""
    monkeypatch.setattr(fold_module, "_CHUNK", 40)
    items = [target(12, 10, name=f"weight{i}", seed=i) for i in range(3)]
    before = [bits(item.weight) for item in items]
    place, original = items[failing // 3].weight[4 * (failing % 3) :].data_ptr(), Target.delta

    def delta(self: Target) -> Any:
        if self.weight.data_ptr() == place:
            raise error("no memory")
        return original(self)

    fold = ReversibleFold()
    monkeypatch.setattr(Target, "delta", delta)
    with pytest.raises(error, match="no memory"):
        fold.fold(items)
    monkeypatch.setattr(Target, "delta", original)
    assert not fold.folded and same(items, before)
    assert fold.original(items[0].weight) is None and fold._passes["torch"].kept() == (0, 0)
    fold.fold(items)
    fold.unfold()
    assert same(items, before)


@pytest.mark.parametrize("failing", range(9))
def test_an_unfold_that_failed_midway_goes_on(failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory in the unfold: what is unfolded already is not unfolded twice."""
    monkeypatch.setattr(fold_module, "_CHUNK", 40)
    items = [target(12, 10, name=f"weight{i}", seed=i, delta=0.5) for i in range(3)]
    before = [bits(item.weight) for item in items]
    fold = ReversibleFold(passes_for=lambda item: "odd" if item.name == "weight1" else "torch")
    fold._passes["odd"] = TorchPasses()
    fold.fold(items)
    made, original = 0, Target.delta

    def delta(self: Target) -> Any:
        nonlocal made
        made += 1
        if made == failing + 1:
            raise MemoryError("no memory")
        return original(self)

    monkeypatch.setattr(Target, "delta", delta)
    with pytest.raises(MemoryError):
        fold.unfold()
    monkeypatch.setattr(Target, "delta", original)
    assert fold.folded
    for item, old in zip(items, before, strict=True):  # a checkpoint written now is right, too
        copied = fold.original(item.weight)
        assert torch.equal(bits(item.weight if copied is None else copied), old)
    fold.unfold()
    assert not fold.folded and same(items, before)


def test_a_later_group_that_fails_takes_the_earlier_ones_back() -> None:
    class Failing(TorchPasses):
        def fold(self, targets: Any, meanwhile: Any = None) -> list[int]:
            raise RuntimeError("no kernel")

    items = [target(name="torch", seed=1), target(name="other", seed=2)]
    before = [bits(item.weight) for item in items]
    fold = ReversibleFold(passes_for=lambda item: item.name)
    fold._passes["other"] = Failing()
    with pytest.raises(RuntimeError, match="no kernel"):
        fold.fold(items)
    assert not fold.folded and same(items, before)


def test_folding_twice_is_refused() -> None:
    item = target()
    before = bits(item.weight)
    fold = ReversibleFold()
    fold.fold([item])
    once = bits(item.weight)
    with pytest.raises(FoldError, match="folded already"):
        fold.fold([item])
    assert fold.folded and torch.equal(bits(item.weight), once)
    fold.unfold()
    assert torch.equal(bits(item.weight), before)


def test_unfolding_without_a_fold_is_nothing() -> None:
    fold = ReversibleFold()
    fold.unfold()
    assert fold.cycles == 0 and not fold.folded


# ---- somebody wrote to it ------------------------------------------------------------------------------------------


def disturb_weight(item: Target) -> None:
    item.weight[2, 3] += 1


def disturb_left(item: Target) -> None:
    item.products[0].left[5] += 0.5


def disturb_right(item: Target) -> None:
    item.products[0].right.mul_(-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("disturb", [disturb_weight, disturb_left, disturb_right])
def test_a_write_between_is_noticed(dtype: Any, disturb: Any) -> None:
    items = [target(dtype=dtype, name=f"weight{i}", seed=i) for i in range(3)]
    before = [bits(item.weight) for item in items]
    fold = ReversibleFold()
    fold.fold(items)
    disturb(items[1])
    with pytest.raises(FoldError, match=r"^weight1 did not unfold.*last checkpoint"):
        fold.unfold()
    assert fold.broken == ("weight1",) and not fold.folded
    assert same([items[0], items[2]], [before[0], before[2]])
    for _ in range(2):
        with pytest.raises(FoldError, match=r"^weight1 did not unfold"):
            fold.fold([items[0]])
    assert same([items[0]], [before[0]])


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(DTYPES), st.integers(0, 11), st.integers(0, 9), st.integers(0, 2**64 - 1), st.integers(0, 99))
def test_any_write_to_one_element_is_noticed_or_does_no_harm(dtype, row, column, pattern, seed) -> None:
    item = target(dtype=dtype, seed=seed, delta=0.1)
    before = bits(item.weight)
    fold = ReversibleFold()
    fold.fold([item])
    width = 8 * item.weight.element_size()
    value = (pattern % (1 << width)) - (1 << (width - 1))
    item.weight.view(INTEGER[item.weight.element_size()])[row, column] = value
    try:
        fold.unfold()
    except FoldError:
        assert not torch.equal(bits(item.weight), before)
    else:
        assert torch.equal(bits(item.weight), before)


def test_the_checkpoint_restores_it(caplog: pytest.LogCaptureFixture) -> None:
    items = [target(name=f"weight{i}", seed=i) for i in range(2)]
    saved = {item.name: item.weight.float() for item in items}  # a checkpoint of another dtype that holds the values
    before = [bits(item.weight) for item in items]
    asked: list[str] = []

    def recover(name: str) -> Any:
        asked.append(name)
        return saved[name]

    fold = ReversibleFold(recover)
    fold.fold(items)
    disturb_weight(items[1])
    with caplog.at_level(logging.WARNING, logger="rlpatch"):
        fold.unfold()
    assert asked == ["weight1"] and same(items, before) and fold.broken == ()
    assert [record.message for record in caplog.records if "unfold" in record.message] == [
        "rlpatch: weight1 did not unfold to its old values and was restored from the checkpoint"
    ]
    fold.fold(items)
    fold.unfold()


@pytest.mark.parametrize("kind", ["wrong values", "wrong shape", "none"])
def test_a_checkpoint_with_other_values_does_not(kind: str) -> None:
    item = target()
    fold = ReversibleFold(
        lambda name: {"wrong values": item.weight * 0 + 1, "wrong shape": torch.zeros(3, 3), "none": None}[kind]
    )
    fold.fold([item])
    disturb_weight(item)
    with pytest.raises(FoldError, match="the checkpoint does not have them"):
        fold.unfold()
    assert fold.broken == (item.name,)


def test_a_base_that_changed_between_rollouts_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    items = [target(name=f"weight{i}", seed=i) for i in range(3)]
    fold = ReversibleFold()

    def cycle() -> int:
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="rlpatch"):
            fold.fold(items)
            fold.unfold()
        return sum("changed between two rollouts" in record.message for record in caplog.records)

    assert cycle() == 0 and cycle() == 0
    items[0].weight.add_(1)
    items[2].weight.add_(1)
    assert cycle() == 1
    assert "weight0 and 1 more" in caplog.text
    assert cycle() == 0
    items[1] = dataclasses.replace(items[1], frozen=False)
    items[1].weight.add_(1)
    assert cycle() == 0, "a weight that is trained may change"


# ---- checksum ------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(DTYPES), st.integers(1, 40), st.integers(1, 40), st.integers(1, 2**64 - 1), st.integers(0, 99),
    st.sampled_from([1, 50, 1 << 24]),
)  # fmt: skip
def test_checksum_notices_any_changed_element(dtype, rows, columns, pattern, seed, chunk) -> None:
    weight = target(rows, columns, dtype, seed=seed).weight
    width = 8 * weight.element_size()
    flip = pattern % (1 << width)
    flip = flip - (1 << width) if flip >> (width - 1) else flip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fold_module, "_CHUNK", chunk)
        before = checksum(weight)
        assert 0 <= before < 1 << max(32, width)
        changed = weight.clone()
        changed.view(INTEGER[weight.element_size()])[seed % rows, seed % columns] ^= flip
        assert (checksum(changed) == before) == (flip == 0)
        for layout in ("transposed", "sliced", "every-other"):
            assert checksum(laid_out(weight, layout)) == before
        assert checksum(weight.T) == before, "of the transposed matrix, too"


@pytest.mark.parametrize("dtype", DTYPES)
def test_checksum_notices_every_bit(dtype: Any) -> None:
    weight = target(5, 7, dtype).weight
    before = checksum(weight)
    for bit in range(8 * weight.element_size()):
        changed = weight.clone()
        pattern = 1 << bit if bit < 8 * weight.element_size() - 1 else -(1 << bit)
        changed.view(INTEGER[weight.element_size()])[3, 2] ^= pattern
        assert checksum(changed) != before, f"bit {bit}"


def test_checksum_is_as_documented() -> None:
    weight = torch.tensor([[1.0, -2.0], [0.5, -0.0]], dtype=torch.float32)
    elements = weight.view(torch.int32).tolist()
    assert checksum(weight) == sum(elements[i][j] * (2 * i + 1) * (2 * j + 1) for i in (0, 1) for j in (0, 1)) % 2**32
    assert checksum(weight) != checksum(weight.flip(0))


# ---- the unfolded copy ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["plain", "transposed", "sliced", "every-other"])
def test_original_of_a_matrix(layout: str) -> None:
    item = target(layout=layout, ranks=(4, 2), delta=0.5)
    before = item.weight.clone()
    fold = ReversibleFold()
    assert fold.original(item.weight) is None
    fold.fold([item])
    folded = bits(item.weight)
    copied = fold.original(item.weight.detach())
    assert torch.equal(bits(copied), bits(before))
    assert copied.data_ptr() != item.weight.data_ptr() and torch.equal(bits(item.weight), folded)
    copied.zero_()
    assert torch.equal(bits(fold.original(item.weight)), bits(before)), "a copy every time"
    fold.unfold()
    assert fold.original(item.weight) is None


@pytest.mark.parametrize("stored", [False, True])
def test_original_of_experts(stored: bool) -> None:
    """One parameter of three dimensions, adapters on two of its three matrices; `stored`: transposed."""
    experts = torch.randn(3, 6, 8).bfloat16()
    if stored:
        experts = experts.mT.contiguous().mT
    before = experts.clone()
    items = [dataclasses.replace(target(6, 8, seed=i, name=f"experts[{i}]"), weight=experts[i]) for i in (0, 2)]
    fold = ReversibleFold()
    fold.fold(items)
    assert not torch.equal(experts, before)
    assert torch.equal(bits(fold.original(experts)), bits(before))
    assert torch.equal(bits(fold.original(experts[2])), bits(before[2]))
    assert fold.original(experts[1]) is None
    fold.unfold()
    assert torch.equal(bits(experts), bits(before))


def test_original_of_anything_else_is_none() -> None:
    item = target()
    fold = ReversibleFold()
    fold.fold([item])
    for other in (torch.zeros(4), torch.zeros(12, 10), item.weight[:3], item.weight.T, torch.zeros(2, 2, 2, 2)):
        assert fold.original(other) is None
    fold.unfold()


# ---- Ctrl-C --------------------------------------------------------------------------------------------------------


@pytest.fixture
def default_handler() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "the handler was not put back"
    signal.signal(signal.SIGINT, before)


def interrupted_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """SIGINT arrives while the `number`-th delta is made."""
    made, original = 0, Target.delta

    def delta(self: Target) -> Any:
        nonlocal made
        made += 1
        if made == number:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self)

    monkeypatch.setattr(Target, "delta", delta)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_ctrl_c_in_the_fold(number: int, monkeypatch: pytest.MonkeyPatch, default_handler: None) -> None:
    items = [target(name=f"weight{i}", seed=i) for i in range(3)]
    before = [bits(item.weight) for item in items]
    fold = ReversibleFold()
    interrupted_at(monkeypatch, number)
    with pytest.raises(KeyboardInterrupt):
        fold.fold(items)
    assert not fold.folded and same(items, before), "an error out of fold() means: nothing is folded"
    fold.fold(items)
    fold.unfold()
    assert same(items, before)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_ctrl_c_in_the_unfold(number: int, monkeypatch: pytest.MonkeyPatch, default_handler: None) -> None:
    items = [target(name=f"weight{i}", seed=i) for i in range(3)]
    before = [bits(item.weight) for item in items]
    fold = ReversibleFold()
    fold.fold(items)
    interrupted_at(monkeypatch, number)
    with pytest.raises(KeyboardInterrupt):
        fold.unfold()
    assert not fold.folded and fold.cycles == 1 and same(items, before)


def test_ctrl_c_does_not_hide_a_damaged_base(monkeypatch: pytest.MonkeyPatch, default_handler: None) -> None:
    item = target()
    fold = ReversibleFold()
    fold.fold([item])
    disturb_weight(item)
    interrupted_at(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt) as caught:
        fold.unfold()
    assert isinstance(caught.value.__context__, FoldError)
    assert fold.broken == (item.name,)
    with pytest.raises(FoldError, match="did not unfold"):
        fold.fold([item])


def test_in_another_thread_signals_are_left_alone(default_handler: None) -> None:
    item = target()
    before = bits(item.weight)
    fold = ReversibleFold()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            fold.fold([item])
            fold.unfold()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors and torch.equal(bits(item.weight), before)


def test_what_the_host_does_meanwhile_is_done_once() -> None:
    items = [target(name="torch", seed=1), target(name="other", seed=2)]
    before = [bits(item.weight) for item in items]
    fold, calls = ReversibleFold(passes_for=lambda item: item.name), []
    fold._passes.update(torch=TorchPasses(), other=TorchPasses())
    fold.fold(items, lambda: calls.append("fold"))
    fold.unfold(lambda: calls.append("unfold"))
    fold.unfold(lambda: calls.append("nothing is folded"))
    assert calls == ["fold", "unfold", "nothing is folded"] and same(items, before)


def test_what_fails_meanwhile_leaves_whole_weights() -> None:
    item = target()
    before = bits(item.weight)
    fold = ReversibleFold()

    def fail() -> None:
        raise StandbyError("no memory")

    with pytest.raises(StandbyError, match="no memory"):
        fold.fold([item], fail)
    assert not fold.folded and torch.equal(bits(item.weight), before)
    fold.fold([item])
    with pytest.raises(StandbyError, match="no memory"):
        fold.unfold(fail)
    assert not fold.folded and torch.equal(bits(item.weight), before) and fold.cycles == 2


def test_a_damaged_base_is_told_before_what_failed_meanwhile() -> None:
    item = target()
    fold, calls = ReversibleFold(), []
    fold.fold([item])
    item.weight[0, 0] += 1

    def fail() -> None:
        calls.append(1)
        raise StandbyError("no memory")

    with pytest.raises(FoldError, match="did not unfold") as caught:
        fold.unfold(fail)
    assert calls == [1] and isinstance(caught.value.__cause__, StandbyError)


def test_an_ignored_ctrl_c_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        fold = ReversibleFold()
        interrupted_at(monkeypatch, 1)
        fold.fold([target()])
        fold.unfold()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


# ---- the report ----------------------------------------------------------------------------------------------------


def test_the_report_counts_what_is_kept() -> None:
    items = [target(64, 48, seed=1, delta=1e-2, name="a"), target(32, 32, torch.float32, seed=2, delta=1e-2, name="b")]
    fold = ReversibleFold()
    report = fold.fold(items)
    kept = [(len(places), places, values) for group in fold._passes["torch"]._kept for places, values in group]
    assert report.weights == 2 and report.elements == 64 * 48 + 32 * 32
    assert report.weight_bytes == 64 * 48 * 2 + 32 * 32 * 4
    assert report.kept == sum(count for count, _, _ in kept) > 0
    assert report.kept_bytes == sum(places.nbytes + values.nbytes for _, places, values in kept)
    assert report.as_dict()["kept"] == report.kept
    fold.unfold()
    assert fold._passes["torch"].kept() == (0, 0), "nothing stays after the unfold"
    assert fold.seconds["fold"] > 0 and fold.seconds["unfold"] > 0


def test_a_small_delta_keeps_about_half_a_percent() -> None:
    item = target(400, 400, delta=3e-3)
    report = ReversibleFold().fold([item])
    assert 0.001 < report.kept / report.elements < 0.01


def test_a_large_delta_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    item = target(64, 64, delta=30.0)
    fold = ReversibleFold()
    with caplog.at_level(logging.WARNING, logger="rlpatch"):
        for _ in range(3):
            fold.fold([item])
            fold.unfold()
    assert sum("its delta is large" in record.message for record in caplog.records) == 1
    caplog.clear()
    ReversibleFold().fold([target(64, 64, delta=1e-4)])
    assert not caplog.records


def test_the_torch_path_serves_the_cpu() -> None:
    assert all(kind_of(target(dtype=dtype)) == "torch" for dtype in DTYPES)
