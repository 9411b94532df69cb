"""A model given as a path, as in plain scripts, on a real GPU. Skips itself without CUDA.

transformers loads it onto the device at once; on a CPU nothing of this kind of memory exists.
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
from rlpatch.sharing.account import resident_bytes, resident_twice  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

KV = 1 << 30


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    lora = {"r": 32, "target_modules": "all-linear"}
    yield from patched_trainer(
        tmp_path_factory.mktemp("model"), KV, lora=lora, from_path=True, eager=True, learning_rate=1e-5
    )


def cached() -> int:
    return int(torch.cuda.memory_reserved() - torch.cuda.memory_allocated())


def test_the_memory_of_the_trainer_s_weights_is_given_back(trainer: Any) -> None:
    """Not merely cached by torch, where the KV cache cannot have it."""
    pair = phases.of_engine(trainer.vllm_generation.llm)
    assert pair is not None and pair.engine is not None and pair.shares
    weights = resident_bytes(pair.engine.model.parameters())
    assert weights > 200 << 20
    assert resident_twice(trainer.model, pair.engine.model) == 0
    torch.cuda.empty_cache()
    assert cached() < 0.4 * weights
    greedy(trainer)
    torch.cuda.empty_cache()
    assert cached() < 0.4 * weights


def test_it_trains_and_rolls_out(trainer: Any) -> None:
    first = greedy(trainer)
    trainer.train()
    assert all(len(tokens) for tokens in first) and all(len(tokens) for tokens in greedy(trainer))
