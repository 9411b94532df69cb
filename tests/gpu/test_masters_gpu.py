"""float32 masters on a real GPU: the same bits as float32 parameters, and what a step takes.

Skips itself without CUDA; needs no engine.
"""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs CUDA", allow_module_level=True)

from gpu_trainer import optimizer_of  # noqa: E402

from rlpatch.parking import ParkedState  # noqa: E402
from rlpatch.precision import masters as module  # noqa: E402
from rlpatch.precision.masters import Masters, clip_norm  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

WIDTH, LAYERS = 4096, 8  # 16 Mi parameters each
PIECE = 2 * WIDTH**2


def weights(dtype: Any) -> Any:
    generator = torch.Generator("cuda").manual_seed(0)
    return [
        torch.nn.Parameter(torch.randn(WIDTH, WIDTH, device="cuda", generator=generator).bfloat16().to(dtype))
        for _ in range(LAYERS)
    ]


def backward(parameters: Any, seed: int) -> None:
    """Gradients that are the same bfloat16 values for either dtype."""
    generator = torch.Generator("cuda").manual_seed(seed)
    for parameter in parameters:
        gradient = torch.randn(WIDTH, WIDTH, device="cuda", generator=generator).bfloat16()
        (parameter * gradient.to(parameter.dtype)).sum().backward()


def clip(parameters: Any) -> float:
    total = clip_norm(parameters, 1.0, 2.0, lambda found: torch.nn.utils.clip_grad_norm_(found, 1.0, 2.0))
    return float(total)


@pytest.mark.parametrize("parked", [False, True])
@pytest.mark.parametrize("name", ["fused", "foreach", "adamw_8bit"])
def test_the_same_bits_a_piece_at_a_time(name: str, parked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", PIECE)
    wide = weights(torch.float32)
    reference = optimizer_of(name, wide)
    norms = []
    for step in range(3):
        backward(wide, step)
        norms.append(clip(wide))
        reference.step()
        reference.zero_grad()
    expected = [p.detach().cpu() for p in wide]
    del wide, reference

    narrow = weights(torch.bfloat16)
    optimizer = optimizer_of(name, narrow)
    masters = Masters()
    masters.attach(optimizer)
    state = ParkedState(optimizer) if parked else None
    for step in range(3):
        backward(narrow, step)
        assert masters.describe()["gradient_bytes"] == 2 * LAYERS * WIDTH**2
        assert clip(narrow) == norms[step]
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        optimizer.step()
        if step and not parked:  # the first makes the state
            copies = 2 if name == "foreach" else 1
            assert torch.cuda.max_memory_allocated() - before <= copies * 4 * PIECE + (32 << 20)
    assert all(torch.equal(masters.master_of(p).cpu(), e) for p, e in zip(narrow, expected, strict=True))
    assert all(torch.equal(p.cpu(), e.bfloat16()) for p, e in zip(narrow, expected, strict=True))
    if state is not None:
        assert state.parked_bytes > 0
        state.close()
    masters.dissolve()
