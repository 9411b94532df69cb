"""Optimizer state that waits in host memory, on a real GPU. Skips itself without CUDA; needs no engine."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs CUDA", allow_module_level=True)

from gpu_trainer import optimizer_of  # noqa: E402

from rlpatch.parking import SMALLEST, ParkedState  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

WIDTH = 4096  # 64 MiB of float32 per layer


def model() -> Any:
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH, device="cuda") for _ in range(4)))


def step(net: Any, optimizer: Any, seed: int) -> None:
    torch.manual_seed(seed)
    net(torch.randn(8, WIDTH, device="cuda")).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def allocated() -> int:
    gc.collect()
    torch.cuda.synchronize()
    return int(torch.cuda.memory_allocated())


@pytest.mark.parametrize("name", ["fused", "foreach", "adamw_8bit"])
def test_the_same_training_with_the_memory_free_between_steps(name: str) -> None:
    one = model()
    plain = optimizer_of(name, one.parameters())
    for seed in range(4):
        step(one, plain, seed)
    expected = [p.detach().cpu() for p in one.parameters()]
    del one, plain
    before = allocated()
    net = model()
    optimizer = optimizer_of(name, net.parameters())
    weights = allocated() - before
    state = ParkedState(optimizer)
    for seed in range(4):
        step(net, optimizer, seed)
        held = allocated() - before - weights
        assert state.parked_bytes >= (weights // 2 if name == "adamw_8bit" else 2 * weights) * 0.95
        assert held < 4 << 20
    assert all(torch.equal(p.detach().cpu(), e) for p, e in zip(net.parameters(), expected, strict=True))
    assert isinstance(state._unpin, weakref.finalize) and state._unpin.alive  # page-locked
    state.close()
    assert allocated() - before - weights >= (weights // 2 if name == "adamw_8bit" else 2 * weights) * 0.95
    step(net, optimizer, 5)


def test_a_checkpoint_goes_back_to_the_host() -> None:
    net = model()
    optimizer = optimizer_of("fused", net.parameters())
    state = ParkedState(optimizer)
    step(net, optimizer, 0)
    saved = {"state": {k: dict(v) for k, v in optimizer.state_dict()["state"].items()},
             "param_groups": optimizer.state_dict()["param_groups"]}  # fmt: skip
    large = [v["exp_avg"] for v in saved["state"].values() if v["exp_avg"].nbytes >= SMALLEST]
    assert len(large) == 4 and all(moment.device.type == "cpu" for moment in large)
    before = allocated()
    optimizer.load_state_dict(saved)
    assert state.parked_bytes > 0 and allocated() - before < 4 << 20
    step(net, optimizer, 1)
    moments = [t for s in optimizer.state.values() for t in (s["exp_avg"], s["exp_avg_sq"])]
    assert all(t.device.type == ("cpu" if t.nbytes >= SMALLEST else "cuda") for t in moments)
