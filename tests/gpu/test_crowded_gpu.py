"""Weights that the device cannot hold twice, on a real GPU. Skips itself without CUDA.

What cannot be seen on a CPU: vLLM fills its model inside of a memory pool, and while that is in use torch gives nothing
back to the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs CUDA", allow_module_level=True)
pytest.importorskip("vllm")
pytest.importorskip("trl")

from gpu_trainer import greedy, patched_trainer  # noqa: E402

from rlpatch import phases  # noqa: E402
from rlpatch.sharing import late  # noqa: E402
from rlpatch.sharing.account import resident_bytes, resident_twice  # noqa: E402
from rlpatch.sharing.share import Sharing  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

KV = 1 << 30
USED: list[int] = []


def used() -> int:
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    fill, constructing = Sharing.fill, phases.Colocation.constructing

    def watched(self: Any, model: Any, loader: Any) -> None:
        def load(weights: Any) -> Any:
            USED.append(used())
            return loader(weights)

        fill(self, model, load)
        USED.append(used())

    def from_here(self: Any, *args: Any) -> Any:
        torch.cuda.empty_cache()
        USED.append(used())
        return constructing(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phases, "free_bytes", lambda device: 0)
        patch.setattr(late.Crowded, "step", 16 << 20)
        patch.setattr(Sharing, "fill", watched)
        patch.setattr(phases.Colocation, "constructing", from_here)
        yield from patched_trainer(tmp_path_factory.mktemp("model"), KV, eager=True, learning_rate=1e-5)


def test_loading_takes_a_fraction_of_the_weights(trainer: Any) -> None:
    pair = phases.of_engine(trainer.vllm_generation.llm)
    assert pair is not None and pair.engine is not None and pair.sharing is not None
    weights = resident_bytes(pair.engine.model.parameters())
    before, first, *during = USED  # the first is taken before any weight is: kernels and workspaces
    assert len(during) > 50
    assert first - before < 0.4 * weights and max(during) - first < 0.4 * weights
    assert pair.shares and not pair.sharing.copied
    assert resident_twice(trainer.model, pair.engine.model) == 0


def test_it_trains_and_rolls_out(trainer: Any) -> None:
    first = greedy(trainer)
    trainer.train()
    assert all(len(tokens) for tokens in first) and all(len(tokens) for tokens in greedy(trainer))
