"""The promises on a real GPU, with torch.compile and CUDA graphs on: one engine, built once, put through everything.

Skips itself without CUDA. The order of the tests matters little, but they share the pair: each leaves it usable.
"""

from __future__ import annotations

import os
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
from rlpatch.errors import SharingError, StandbyError  # noqa: E402
from rlpatch.sharing.account import resident_twice  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

KV = 8 << 30


@pytest.fixture(scope="session")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    yield from patched_trainer(tmp_path_factory.mktemp("model"), KV, learning_rate=1e-5)


@pytest.fixture
def pair(trainer: Any) -> phases.Colocation:
    found = phases.of_engine(trainer.vllm_generation.llm)
    assert found is not None and found.engine is not None and found.standby is not None
    return found


def used() -> int:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def test_graphs_and_compilation_are_on(trainer: Any, pair: phases.Colocation) -> None:
    config = trainer.vllm_generation.llm.llm_engine.vllm_config
    assert not config.model_config.enforce_eager
    assert "NONE" not in str(config.compilation_config.cudagraph_mode)


def test_everything_is_shared(trainer: Any, pair: phases.Colocation) -> None:
    report = pair.sharing.report()
    assert len(report.shared) == len(list(trainer.model.parameters())) and not report.copied
    assert resident_twice(trainer.model, pair.engine.model) == 0


def test_addresses_and_policy_over_training(trainer: Any, pair: phases.Colocation) -> None:
    before = {name: p.data_ptr() for name, p in pair.engine.model.named_parameters()}
    trainer.train()
    assert {name: p.data_ptr() for name, p in pair.engine.model.named_parameters()} == before
    assert resident_twice(trainer.model, pair.engine.model) == 0
    rows = [row["sampling/sampling_logp_difference/mean"] for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 4 and max(rows) < 0.1


def test_segments_expand_outside_of_the_engine_s_pool(trainer: Any, pair: phases.Colocation) -> None:
    from vllm.device_allocator.cumem import CuMemAllocator

    if pair.unexpanded is not None:
        pytest.skip("run with RLPATCH_EXPANDABLE_SEGMENTS=1")
    snapshot = torch.cuda.memory._snapshot()
    assert snapshot["allocator_settings"]["expandable_segments"] is True
    expandable = [segment for segment in snapshot["segments"] if segment["is_expandable"]]
    assert sum(segment["total_size"] for segment in expandable) > 256 << 20
    pool = CuMemAllocator.get_instance().pointer_to_data
    assert not any(s["address"] <= start < s["address"] + s["total_size"] for s in expandable for start in pool)


def test_rollouts_follow_without_any_push(trainer: Any, pair: phases.Colocation) -> None:
    first = greedy(trainer)
    old = trainer.model.lm_head.weight.detach().clone()
    with torch.no_grad():
        trainer.model.lm_head.weight.copy_(old.roll(1, 0))
    trainer.vllm_generation.sync_weights()
    second = greedy(trainer)
    with torch.no_grad():
        trainer.model.lm_head.weight.copy_(old)
    trainer.vllm_generation.sync_weights()
    assert second != first
    assert greedy(trainer) == first


def test_same_tokens_after_cycles(trainer: Any, pair: phases.Colocation) -> None:
    pair.standby.restore()
    resident = [p.data_ptr() for p in pair.engine.kv_tensors()]
    pair.standby.release()
    first = greedy(trainer)
    for _ in range(5):
        assert pair.standby.released
        assert greedy(trainer) == first
    pair.standby.restore()
    assert [p.data_ptr() for p in pair.engine.kv_tensors()] == resident
    pair.standby.release()


def test_memory_really_goes_back(pair: phases.Colocation) -> None:
    out = used()
    pair.standby.restore()
    within = used()
    pair.standby.release()
    assert within - out > 0.95 * KV
    assert abs(used() - out) < 64 << 20
    assert pair.standby.mechanism.resident_bytes() == 0


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_interrupted_rollout(
    trainer: Any, pair: phases.Colocation, failure: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = trainer.vllm_generation.llm
    expected = greedy(trainer)
    steps = 0
    original = type(llm.llm_engine).step

    def interrupted(self: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 5:
            raise failure("stop")
        return original(self)

    monkeypatch.setattr(type(llm.llm_engine), "step", interrupted)
    with pytest.raises(failure):
        greedy(trainer)
    monkeypatch.undo()
    assert pair.standby.released and not llm.llm_engine.has_unfinished_requests()
    assert greedy(trainer) == expected


def test_restore_without_memory_is_told_and_can_be_tried_again(trainer: Any, pair: phases.Colocation) -> None:
    """A real out-of-memory: the device is filled while the KV cache is out (in part: test_partial_restore_gpu.py)."""
    expected = greedy(trainer)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    ballast = torch.empty(free - (256 << 20), dtype=torch.uint8, device="cuda")
    before = trainer.model.lm_head.weight.detach().clone()
    with pytest.raises(StandbyError, match="vllm_gpu_memory_utilization"):
        greedy(trainer)
    assert pair.standby.released
    assert torch.equal(before, trainer.model.lm_head.weight)
    del ballast
    torch.cuda.empty_cache()
    assert greedy(trainer) == expected


@pytest.mark.parametrize("level", [1, 2])
def test_no_sleep_level_reaches_shared_weights(trainer: Any, pair: phases.Colocation, level: int) -> None:
    llm = trainer.vllm_generation.llm
    before = trainer.model.lm_head.weight.detach().clone()
    llm.sleep(level=level)
    assert pair.standby.released
    with pytest.raises(SharingError):
        llm.llm_engine.model_executor.sleep(level)
    llm.wake_up()
    assert not pair.standby.released
    pair.standby.release()
    assert torch.equal(before, trainer.model.lm_head.weight)


def test_allocator_options_survive(trainer: Any) -> None:
    """vLLM [0.20, 0.31) toggles expandable_segments with a bare string, which drops every other option (drift)."""
    conf = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    if "max_split_size_mb" not in conf:
        pytest.skip("run with PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True,max_split_size_mb:512")
    settings = torch.cuda.memory._snapshot()["allocator_settings"]
    assert settings["max_split_size"] == 512 << 20
    assert settings["expandable_segments"] is True
