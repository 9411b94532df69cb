"""The reversible fold on a real GPU: the kernel alone, and a LoRA trained under CUDA graphs and torch.compile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs CUDA", allow_module_level=True)
pytest.importorskip("triton")
pytest.importorskip("vllm")
pytest.importorskip("trl")
pytest.importorskip("peft")

from gpu_trainer import greedy, patched_trainer  # noqa: E402

from rlpatch import phases  # noqa: E402
from rlpatch.errors import FoldError  # noqa: E402
from rlpatch.lora.fold import ReversibleFold, checksum, kind_of  # noqa: E402
from rlpatch.lora.target import Product, Target  # noqa: E402
from rlpatch.sharing.account import resident_twice  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

KV = 4 << 30
BITS = {2: torch.int16, 4: torch.int32}


def bits(tensor: Any) -> Any:
    return tensor.contiguous().view(BITS[tensor.element_size()])


def target(rows: int, columns: int, ranks: list[int], dtype: Any, magnitude: float, transposed: bool) -> Target:
    weight = torch.randn(columns, rows, device="cuda").T if transposed else torch.randn(rows, columns, device="cuda")
    weight = weight.to(dtype)
    weight[0, 0], weight[-1, -1], weight[rows // 2, 0] = -0.0, 0.0, torch.finfo(dtype).smallest_normal / 2
    products = tuple(
        Product(torch.randn(rows, r, device="cuda") * magnitude, torch.randn(r, columns, device="cuda") * r**-0.5, 1.5)
        for r in ranks
    )
    return Target(f"w{rows}x{columns}", weight, products)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("magnitude", [0.0, 1e-6, 1e-3, 1e-2, 1.0, 50.0])
def test_round_trip_is_exact(dtype: Any, magnitude: float) -> None:
    torch.manual_seed(0)
    targets = [
        target(64, 128, [32], dtype, magnitude, False),
        target(1, 1, [1], dtype, magnitude, False),
        target(130, 67, [5], dtype, magnitude, False),
        target(192, 64, [100], dtype, magnitude, True),
        target(300, 1000, [8, 24], dtype, magnitude, False),
        target(1024, 1024, [16], dtype, magnitude, False),
        target(1024, 1024, [16], dtype, magnitude, False),
    ]
    targets = [Target(f"{n}.{t.name}", t.weight, t.products) for n, t in enumerate(targets)]
    assert {kind_of(t) for t in targets} == {"triton"}
    before = [t.weight.clone() for t in targets]
    fold = ReversibleFold()
    for _ in range(2):  # the second has room for what the first had to ask for
        fold.fold(targets)
        for t, old in zip(targets, before, strict=True):
            assert fold.checksums[t.name] == checksum(old)
            exact = old.double() + sum(1.5 * p.left.double() @ p.right.double() for p in t.products)
            # one rounding of the element, and what the factors' 16 (fp32: 24) bits leave of the delta
            ulp = torch.finfo(dtype).eps * exact.abs() + torch.finfo(dtype).tiny
            size = sum(1.5 * p.left.double().abs() @ p.right.double().abs() for p in t.products)
            slack = size * (2**-15 if dtype != torch.float32 else 2**-20)
            assert bool(((t.weight.double() - exact).abs() <= 0.51 * ulp + slack).all()), t.name
        copy = fold.original(targets[3].weight)
        assert copy is not None and torch.equal(bits(copy), bits(before[3]))
        fold.unfold()
        for t, old in zip(targets, before, strict=True):
            assert torch.equal(bits(t.weight), bits(old)), t.name


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("where", ["base", "adapter"])
def test_what_is_not_finite_is_refused(value: float, where: str) -> None:
    good, bad = target(128, 128, [8], torch.bfloat16, 1e-2, False), target(256, 64, [8], torch.bfloat16, 1e-2, False)
    (bad.weight if where == "base" else bad.products[0].left)[100, 3] = value
    before = [good.weight.clone(), bad.weight.clone()]
    with pytest.raises(FoldError, match=bad.name):
        ReversibleFold().fold([good, bad])
    assert torch.equal(bits(good.weight), bits(before[0])) and torch.equal(bits(bad.weight), bits(before[1]))


def test_memory_kept_is_small() -> None:
    torch.manual_seed(0)
    big = target(4096, 4096, [32], torch.bfloat16, 1e-2 / 1.5, False)  # times the adapter's scaling: |D|/|W| = 1e-2
    fold = ReversibleFold()
    for _ in range(2):
        report = fold.fold([big])
        fold.unfold()
    assert report.kept > 0 and report.kept_bytes < 0.02 * report.weight_bytes


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    lora = {"r": 32, "lora_alpha": 64}
    yield from patched_trainer(tmp_path_factory.mktemp("model"), KV, lora=lora, learning_rate=1e-3, beta=0.01)


def test_lora_training_leaves_the_base_alone(trainer: Any) -> None:
    pair = phases.of_engine(trainer.vllm_generation.llm)
    assert pair is not None and pair.engine is not None and pair.lora is not None and pair.lora.mode == "fold"
    frozen = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert name not in frozen or torch.equal(bits(parameter.detach()), bits(frozen[name])), name
    assert pair.policy is not None and pair.policy.describe()["cycles"] == 4
    assert pair.policy.describe()["kept"] > 0  # the delta was large enough for something to be lost
    rows = [row["sampling/sampling_logp_difference/mean"] for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 4 and max(rows) < 0.1
    assert resident_twice(trainer.model, pair.engine.model) < sum(
        p.numel() * p.element_size() for p in trainer.model.parameters() if p.requires_grad
    ) + (1 << 20)


def test_rollouts_follow_the_adapter(trainer: Any) -> None:
    first = greedy(trainer)
    layer = next(m for m in trainer.model.modules() if hasattr(m, "lora_B") and "default" in m.lora_B)
    weight = layer.lora_B["default"].weight
    old = weight.detach().clone()
    with torch.no_grad():
        weight.add_(torch.randn_like(weight))
    second = greedy(trainer)
    with torch.no_grad():
        weight.copy_(old)
    assert second != first
    assert greedy(trainer) == first
