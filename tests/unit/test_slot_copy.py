"""What is written into LoRA slots, and what is refused, without an engine."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from rlpatch.errors import UsageError  # noqa: E402
from rlpatch.lora.slots import Place, Slots, accepted_rank, rank_of  # noqa: E402
from rlpatch.lora.target import Product, Target  # noqa: E402

RANKS = (1, 8, 16, 32)
MAX_RANK = 8


class FakeSlots:
    """Buffers as vLLM's; ``a.weight`` is one matrix, ``fused.weight`` is kept in two parts, 3 and 5 rows."""

    def __init__(self, dtype: Any = None) -> None:
        dtype = dtype or torch.float32
        self.buffers = {
            name: (
                [torch.zeros(1, 1, MAX_RANK, columns, dtype=dtype) for _ in parts],
                [torch.zeros(1, 1, rows, MAX_RANK, dtype=dtype) for rows in parts],
            )
            for name, columns, parts in (("a.weight", 6, (4,)), ("fused.weight", 5, (3, 5)))
        }
        self.registered = False
        self.registrations = 0
        self.scaled = True

    @staticmethod
    def accepted_ranks() -> tuple[int, ...]:
        return RANKS

    @staticmethod
    def engine_arguments(rank: int) -> dict[str, Any]:
        return {"max_lora_rank": accepted_rank(rank, RANKS)}

    def locate(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Place | str]:
        assert not self.registered
        found: dict[str, Place | str] = {}
        for name in shapes:
            if name not in self.buffers:
                found[name] = "the engine has no LoRA slot for it"
                continue
            right, left = self.buffers[name]
            starts = [sum(int(b.shape[2]) for b in left[:i]) for i in range(len(left))]
            parts = tuple((start, b[0, 0]) for start, b in zip(starts, left, strict=True))
            found[name] = Place(name.removesuffix(".weight"), tuple(a[0, 0] for a in right), parts)
        return found

    def register(self, pairs: Mapping[str, Any], scale: float) -> Any:
        self.registered, self.registrations = True, self.registrations + 1
        for name, (a, b) in pairs.items():
            right, left = self.buffers[name]
            start, rank = 0, a.shape[0]
            for buffer_a, buffer_b in zip(right, left, strict=True):
                buffer_a[0, 0, :rank] = a
                rows = b[start : start + buffer_b.shape[2]]
                buffer_b[0, 0, :, :rank] = rows * (scale if self.scaled else 1)
                start += buffer_b.shape[2]
        return "request"

    def active(self) -> bool:
        return self.registered

    def remove(self) -> None:
        self.registered = False


def product(rows: int, columns: int, rank: int, seed: int = 0, scale: float = 1.5, name: str = "default") -> Product:
    g = torch.Generator().manual_seed(seed)
    return Product(torch.randn(rows, rank, generator=g), torch.randn(rank, columns, generator=g), scale, name)


def target(name: str, rows: int, columns: int, *ranks: int, seed: int = 0) -> Target:
    products = tuple(product(rows, columns, rank, seed + i) for i, rank in enumerate(ranks))
    return Target(name, torch.zeros(rows, columns), products)


def both(rank: int = 2, seed: int = 0) -> list[Target]:
    return [target("a.weight", 4, 6, rank, seed=seed), target("fused.weight", 8, 5, rank, seed=seed + 10)]


def slots_on(fake: FakeSlots, targets: list[Target]) -> Slots:
    return Slots(SimpleNamespace(device=torch.device("cpu")), fake, targets)  # type: ignore[arg-type]


def served(fake: FakeSlots, name: str) -> Any:
    """The delta that a kernel would compute from the buffers: every part with its own A."""
    right, left = fake.buffers[name]
    return torch.cat([b[0, 0].double() @ a[0, 0].double() for a, b in zip(right, left, strict=True)])


def agree(fake: FakeSlots, targets: list[Target]) -> bool:
    return all(torch.allclose(served(fake, t.name), t.delta().double(), atol=1e-5) for t in targets)


@pytest.mark.parametrize(("rank", "expected"), [(1, 1), (2, 8), (8, 8), (9, 16), (32, 32)])
def test_smallest_accepted_rank(rank: int, expected: int) -> None:
    assert accepted_rank(rank, RANKS) == expected
    assert accepted_rank(rank, tuple(reversed(RANKS))) == expected


def test_rank_errors_name_setting_numbers_and_remedy() -> None:
    with pytest.raises(UsageError, match=r"LoraConfig\.r=33 .*at most 32.*r=32 or less"):
        accepted_rank(33, RANKS)
    with pytest.raises(UsageError, match=r"LoraConfig\.r=9 .*max_lora_rank=8; .*max_lora_rank=16, or train with r=8"):
        accepted_rank(9, RANKS, limit=8)
    with pytest.raises(UsageError, match=r"LoraConfig\.r=40 .*max_lora_rank=40"):
        accepted_rank(40, RANKS, limit=8)
    with pytest.raises(UsageError, match=r"LoraConfig\.r=0"):
        accepted_rank(0, RANKS)
    assert accepted_rank(8, RANKS, limit=8) == 8


def test_rank_of_sums_the_adapters_on_one_weight() -> None:
    assert rank_of([target("a.weight", 4, 6, 2, 3), target("fused.weight", 8, 5, 4)]) == 5
    assert rank_of([]) == 0


def test_update_writes_what_the_adapters_add() -> None:
    fake = FakeSlots()
    slots = slots_on(fake, both())
    slots.register()
    assert slots.request == "request"
    assert not any(served(fake, name).any() for name in fake.buffers), "registered, and nothing but zeros yet"
    for seed in (1, 2):
        slots.update(both(seed=seed))
        assert agree(fake, both(seed=seed))
    assert not agree(fake, both(seed=1))
    assert fake.registrations == 1


def test_smaller_ranks_and_fewer_weights_leave_zeros() -> None:
    fake = FakeSlots()
    slots = slots_on(fake, both(8))
    slots.register()
    slots.update(both(8))
    slots.update(both(3, seed=4))
    assert agree(fake, both(3, seed=4))
    for right, left in fake.buffers.values():
        assert not any(a[0, 0, 3:].any() for a in right) and not any(b[0, 0, :, 3:].any() for b in left)
    slots.update(both(3, seed=4)[:1])
    assert not served(fake, "fused.weight").any()
    assert not any(b.any() for b in fake.buffers["fused.weight"][1])
    assert agree(fake, both(3, seed=4)[:1])
    slots.update(both(3))
    assert agree(fake, both(3))
    assert fake.registrations == 1


def test_adapters_stand_side_by_side() -> None:
    fake = FakeSlots()
    pair = [target("a.weight", 4, 6, 2, 3), target("fused.weight", 8, 5, 4, 4)]
    slots = slots_on(fake, pair)
    slots.register()
    slots.update(pair)
    assert agree(fake, pair)


def test_scaling_is_rounded_once() -> None:
    fake = FakeSlots(torch.bfloat16)
    slots = slots_on(fake, both())
    slots.register()
    (one, _) = both()
    slots.update([one])
    left = one.products[0].left
    assert torch.equal(fake.buffers["a.weight"][1][0][0, 0, :, :2], (left * 1.5).bfloat16())
    assert not torch.equal((left.bfloat16() * 1.5), (left * 1.5).bfloat16()), "the inputs do not tell the two apart"


def test_strides_of_the_adapters_do_not_matter() -> None:
    fake = FakeSlots()
    plain = target("a.weight", 4, 6, 2)
    (p,) = plain.products
    odd = Target("a.weight", plain.weight, (Product(p.left.T.contiguous().T, p.right, p.scale),))
    slots = slots_on(fake, [odd])
    slots.register()
    slots.update([odd])
    assert agree(fake, [plain])


def test_parameters_are_read_not_tracked() -> None:
    fake = FakeSlots()
    trained = [
        Target(t.name, t.weight, (Product(torch.nn.Parameter(p.left), torch.nn.Parameter(p.right), p.scale),))
        for t in both()
        for p in t.products
    ]
    slots = slots_on(fake, trained)
    slots.register()
    slots.update(trained)
    assert agree(fake, both())
    assert not any(b.requires_grad for _, left in fake.buffers.values() for b in left)


def test_addresses_stay() -> None:
    fake = FakeSlots()
    pointers = [b.data_ptr() for right, left in fake.buffers.values() for b in (*right, *left)]
    slots = slots_on(fake, both())
    slots.register()
    slots.update(both())
    assert [b.data_ptr() for right, left in fake.buffers.values() for b in (*right, *left)] == pointers


def test_a_lost_or_larger_adapter_is_registered_again() -> None:
    fake = FakeSlots()
    slots = slots_on(fake, both()[:1])
    slots.register()
    slots.update(both())
    assert fake.registrations == 2 and agree(fake, both())
    fake.registered = False
    slots.update(both(seed=3))
    assert fake.registrations == 3 and agree(fake, both(seed=3))
    slots.update(both(seed=5)[1:])
    assert fake.registrations == 3 and agree(fake, both(seed=5)[1:]) and not served(fake, "a.weight").any()


def test_a_slot_that_is_filled_otherwise_is_refused_and_nothing_stays_registered() -> None:
    fake = FakeSlots()
    fake.scaled = False
    slots = slots_on(fake, both())
    with pytest.raises(UsageError, match=r"a\.weight.*otherwise than rlpatch would"):
        slots.register()
    assert not fake.registered
    with pytest.raises(UsageError, match=r"call Slots\.register"):
        _ = slots.request


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (target("other.weight", 4, 6, 2), "has no LoRA slot"),
        (target("a.weight", 5, 6, 2), "the trainer's weight is"),
        (target("experts.down_proj[3]", 4, 6, 2), "one expert of a 3-D parameter"),
        (Target("experts.0", torch.zeros(4, 6), (product(4, 6, 2),), parameter="experts"), "3-D parameter"),
        (target("a.scale", 4, 6, 2), "no layer's weight"),
        (target("a.weight", 4, 6, 9), "max_lora_rank=8"),
        (target("a.weight", 4, 6, 5, 4), r"LoraConfig.r=9"),
        (Target("a.weight", torch.zeros(4, 6), (product(4, 6, 2), product(4, 5, 2))), "different shapes"),
        (
            Target("a.weight", torch.zeros(4, 6), (Product(torch.ones(2, 4).T, torch.ones(6, 2).T, 1.0),)),
            "stored transposed",
        ),
    ],
)
def test_refusals_by_name(bad: Target, why: str) -> None:
    fake = FakeSlots()
    slots = slots_on(fake, [target("fused.weight", 8, 5, 2), bad])
    refusals = slots.refusals()
    assert set(refusals) == {bad.name} and why in refusals[bad.name]
    with pytest.raises(UsageError, match=r"LoraConfig\.target_modules"):
        slots.register()
    assert not fake.registered


def test_a_refused_update_leaves_the_slot() -> None:
    fake = FakeSlots()
    slots = slots_on(fake, both())
    slots.register()
    slots.update(both())
    with pytest.raises(UsageError, match="max_lora_rank=8"):
        slots.update([both(seed=2)[0], target("fused.weight", 8, 5, 9)])
    with pytest.raises(UsageError, match="its shape became"):
        slots.update([both(seed=2)[0], target("fused.weight", 7, 5, 2)])
    assert agree(fake, both())


def test_without_adapters_there_is_nothing_to_serve() -> None:
    with pytest.raises(UsageError, match="no active LoRA"):
        slots_on(FakeSlots(), [Target("a.weight", torch.zeros(4, 6), ())]).register()


def test_many_refusals_stay_readable() -> None:
    slots = slots_on(FakeSlots(), [target(f"layer{i}.weight", 4, 6, 2) for i in range(40)])
    with pytest.raises(UsageError, match=r"layer3\.weight and 36 more: the engine has no LoRA slot"):
        slots.register()
