"""A KV cache that comes back in part on a real GPU, graphs and compilation on: one engine, built once.

A ballast tensor takes the device's memory. Skips itself without CUDA. Each test leaves the pair usable, and released.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs CUDA", allow_module_level=True)
pytest.importorskip("vllm")
pytest.importorskip("trl")

from gpu_trainer import greedy, patched_trainer  # noqa: E402

import rlpatch  # noqa: E402
from rlpatch import phases  # noqa: E402
from rlpatch.adapters.vllm._pieces import Prefixes, kept_free  # noqa: E402
from rlpatch.errors import StandbyError  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

KV = 12 << 30  # a quarter of it is more than what a partial restore keeps free


@pytest.fixture(scope="session")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    yield from patched_trainer(tmp_path_factory.mktemp("model"), KV, steps=2, learning_rate=1e-5)


@pytest.fixture
def pair(trainer: Any) -> Iterator[phases.Colocation]:
    found = phases.of_engine(trainer.vllm_generation.llm)
    assert found is not None and found.engine is not None and found.standby is not None
    assert found.standby.released and found.standby.mechanism.resident_bytes() == 0
    yield found
    if not found.standby.released:  # one failure is enough
        found.standby.release()


@contextlib.contextmanager
def room_for(pair: phases.Colocation, kv_bytes: int) -> Iterator[int]:
    """Leaves `kv_bytes` of the device for KV blocks, up to 20 MiB more; yields the free bytes before they come."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    assert pair.engine is not None
    page = 20 << 20  # torch's, of large expandable segments
    size = (free - kept_free(pair.engine, total) - kv_bytes) // page * page
    ballast: list[Any] = [torch.empty(size, dtype=torch.uint8, device="cuda")]
    try:
        yield int(torch.cuda.mem_get_info()[0])
    finally:
        ballast.clear()
        torch.cuda.empty_cache()


def kv_blocks() -> tuple[int, int]:
    """Usable and all, as ``status()`` has them."""
    (pair,) = rlpatch.status().pairs
    blocks = pair["standby"]["kv_blocks"] or {"usable": 1, "total": 1}  # None: nothing ever fell short
    return blocks["usable"], blocks["total"]


def everything_is_back() -> bool:
    usable, total = kv_blocks()
    return usable == total


def test_training_with_fewer_and_fewer_blocks(trainer: Any, pair: phases.Colocation) -> None:
    """The optimizer's state comes with the first step, and the second rollout finds less room."""
    with room_for(pair, 3 * KV // 4):
        trainer.train()
        rows = [row["sampling/sampling_logp_difference/mean"] for row in trainer.state.log_history if "loss" in row]
        assert len(rows) == 2 and max(rows) < 0.1
        usable, total = kv_blocks()
        assert 2 < usable < 0.75 * total
    assert greedy(trainer) and everything_is_back()


def test_fewer_blocks_give_the_same_tokens_and_all_come_back(trainer: Any, pair: phases.Colocation) -> None:
    whole = greedy(trainer)
    addresses = [tensor.data_ptr() for tensor in pair.engine.kv_views()]
    for share in (1 / 2, 1 / 8, 3 / 4):
        with room_for(pair, int(share * KV)) as free:
            pair.standby.restore()
            (usable, total), resident = kv_blocks(), pair.standby.mechanism.resident_bytes()
            slack = (32 << 20) / KV
            assert 0.8 * share < usable / total < share + slack and 0.8 * share < resident / KV < share + slack
            assert abs(free - torch.cuda.mem_get_info()[0] - resident) < 64 << 20  # really that much, and no more
            assert greedy(trainer) == whole
            for _ in range(3):  # and in further cycles
                assert pair.standby.released and pair.standby.mechanism.resident_bytes() == 0
                assert greedy(trainer) == whole and not everything_is_back()
            torch.cuda.empty_cache()
            assert abs(free - torch.cuda.mem_get_info()[0]) < 128 << 20  # all of it went back
        assert greedy(trainer) == whole and everything_is_back()
    assert [tensor.data_ptr() for tensor in pair.engine.kv_views()] == addresses
    pair.standby.restore()
    assert pair.standby.mechanism.resident_bytes() > 0.95 * KV
    pair.standby.release()


def test_every_block_that_came_back_can_be_written(trainer: Any, pair: phases.Colocation) -> None:
    """Through the engine's own tensors, up to the limit; an address that is not mapped would end the process."""
    with room_for(pair, KV // 3):
        pair.standby.restore()
        usable, total = kv_blocks()
        assert usable < total
        for view in pair.engine.kv_views():
            dimension = 0 if view.shape[0] % total == 0 else 1
            rows = usable * (view.shape[dimension] // total)
            view.narrow(dimension, 0, rows).fill_(1)
            assert float(view.narrow(dimension, rows - 1, 1).float().mean()) == 1.0
        torch.cuda.synchronize()
        pair.standby.release()


def test_so_few_blocks_that_requests_wait_and_are_preempted(trainer: Any, pair: phases.Colocation) -> None:
    """Other batches and recomputed prompts are other kernels: a random model's greedy tokens need not stay the same."""
    whole = greedy(trainer, length=400)
    mechanism = pair.standby.mechanism
    out = getattr(mechanism, "memory", mechanism)._allocations
    total = pair.engine.core.scheduler.kv_cache_config.num_blocks
    prefixes = Prefixes(pair.engine.kv_views(), [(data.handle[2], data.handle[1]) for data in out], total)
    with room_for(pair, prefixes.size(40)):  # one sequence of max_model_len takes 32, all prompts together over 200
        fewer = greedy(trainer, length=400)
        assert 40 <= kv_blocks()[0] < 200
    assert [len(row) for row in fewer] == [len(row) for row in whole] or all(fewer)
    assert greedy(trainer, length=400) == whole


def test_too_little_for_anything(trainer: Any, pair: phases.Colocation) -> None:
    expected = greedy(trainer)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    with room_for(pair, -(64 << 20)):
        for _ in range(2):
            with pytest.raises(StandbyError, match=r"room for \d+ of \d+ blocks") as caught:
                greedy(trainer)
            assert "MiB are free" in str(caught.value) and "intact" in str(caught.value)
            assert pair.standby.released and pair.standby.mechanism.resident_bytes() == 0
    assert all(torch.equal(before[name], parameter) for name, parameter in trainer.model.named_parameters())
    assert greedy(trainer) == expected and everything_is_back()


def test_too_little_for_a_sequence(trainer: Any, pair: phases.Colocation, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few blocks came back, and a request that would need more is refused instead of waiting for ever."""
    expected = greedy(trainer)
    before = trainer.model.lm_head.weight.detach().clone()
    monkeypatch.setattr(Prefixes, "most", lambda self, room: 4)  # granules hold more than that
    with room_for(pair, KV // 4), pytest.raises(StandbyError, match=r"needs \d+ KV blocks, and 3 of \d+ came back"):
        greedy(trainer, length=200)
    assert pair.standby.released and pair.standby.mechanism.resident_bytes() == 0
    monkeypatch.undo()
    assert torch.equal(before, trainer.model.lm_head.weight)
    assert greedy(trainer) == expected and everything_is_back()
