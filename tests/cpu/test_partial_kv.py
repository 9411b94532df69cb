"""A KV cache of which only the first blocks come back, in a real engine and by the released allocator's own bookkeeping.

The CUDA driver is the fake of `fake_cumem`: the engine's KV memory is on the CPU, stays where it is, and is full of NaN
where it is "not mapped". What is above the driver is real: vLLM's CuMemAllocator, its executor's tags and the scheduler,
and this release's standby as on CUDA.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fake_cumem import POISON, FakeDriver

import rlpatch
from rlpatch import phases
from rlpatch.adapters.vllm import _pieces, _pool
from rlpatch.demo import worker
from rlpatch.engine import Engine
from rlpatch.errors import StandbyError

pytestmark = [pytest.mark.cpu, pytest.mark.timeout(600)]

cumem = pytest.importorskip("vllm.device_allocator.cumem")

BLOCK, TOTAL, GRANULE = 32, 64, 64  # tokens, blocks, bytes
KEPT = 100 * GRANULE
PROMPTS = [[3 + i, 9, 14 + i, 22, 31] for i in range(6)]


class OnCuda(Engine):
    """Says that it is on a GPU, so that the standby of GPUs is at work."""

    device = torch.device("cuda")  # type: ignore[assignment]


class Rig:
    """A trainer's engine whose KV cache is in vLLM's pool, over the fake driver."""

    def __init__(self, trainer: Any, patch: pytest.MonkeyPatch) -> None:
        self.llm = worker.engine_of(trainer)
        (self.pair,) = phases.live()
        assert self.pair.standby is not None and self.pair.engine is not None
        self.standby = self.pair.standby
        self.standby.restore()  # for good: from here on the memory only seems to come and go
        self.driver = driver = FakeDriver()
        self.storages = [tensor.untyped_storage() for tensor in self.pair.engine.kv_tensors()]
        self.total = sum(storage.nbytes() for storage in self.storages)

        patch.setattr(_pieces, "GRANULE", GRANULE)
        patch.setattr(_pool, "GRANULE", GRANULE)
        patch.setattr(_pieces, "memory", lambda device: (driver.free(), driver.capacity or 1 << 50))
        patch.setattr(_pieces, "kept_free", lambda engine, device: KEPT)
        patch.setattr(_pool, "synchronize", lambda device: None)
        for module in ("rlpatch.adapters.vllm._pool.make_room", "rlpatch.standby.make_room"):
            patch.setattr(module, lambda device: None)
        patch.setattr(cumem, "cumem_available", True)
        patch.setattr(cumem, "python_create_and_map", driver.create_and_map)
        patch.setattr(cumem, "python_unmap_and_release", driver.unmap_and_release)
        patch.setattr(torch.accelerator, "synchronize", lambda *args: None)
        if hasattr(torch.accelerator, "empty_cache"):
            patch.setattr(torch.accelerator, "empty_cache", lambda: None)

        self.allocator = cumem.CuMemAllocator.get_instance()
        self.allocator.current_tag = "kv_cache"
        for storage in self.storages:
            self.allocator.python_malloc_callback(driver.allocate(storage.data_ptr(), storage.nbytes()))
        cpu_worker = self.pair.engine.worker  # its own do nothing; gpu_worker.py's reach the pool like this
        cpu_worker.discard = lambda tags: self.allocator.discard(tags)
        cpu_worker.wake_up = lambda tags=None: self.allocator.wake_up(tags)
        self.standby.mechanism = self.pair.context.providers["standby"](OnCuda(self.llm))
        driver.capacity = self.total + KEPT

    def tokens(self, length: int = 40) -> list[list[int]]:
        from vllm import SamplingParams

        outputs = self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in PROMPTS],
            SamplingParams(temperature=0, max_tokens=length, ignore_eos=True),
            use_tqdm=False,
        )
        return [list(output.outputs[0].token_ids) for output in outputs]

    def untouched(self) -> bool:
        """Whether all that is not mapped is as the driver left it."""
        for storage in self.storages:
            memory = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[call-overload]
            backed = self.driver.backed(storage.data_ptr(), storage.nbytes())
            if not (memory[~torch.frombuffer(backed, dtype=torch.uint8).bool()] == POISON).all():
                return False
        return True

    def asleep(self) -> bool:
        """By upstream's books; they agree with one another."""
        (asleep,) = {data.is_asleep for data in self.allocator.pointer_to_data.values()}
        if hasattr(self.llm, "release_kv_cache_memory"):
            assert ("kv_cache" in self.pair.engine.core.model_executor.sleeping_tags) is asleep  # type: ignore[union-attr]
        return bool(asleep)


@pytest.fixture(scope="module")
def rig(tiny_model: str) -> Iterator[Rig]:
    rlpatch.apply()
    engine = {"kv_cache_memory_bytes": None, "num_gpu_blocks_override": TOTAL, "block_size": BLOCK}
    trainer = worker.make_trainer(
        worker.Job(tiny_model, True, steps=1, engine=engine, config={"vllm_max_model_length": 256})
    )
    if not hasattr(cumem.AllocationData, "is_asleep"):
        pytest.skip("this release's allocator does not know what is asleep; see tests/unit/test_partial_restore.py")
    with pytest.MonkeyPatch.context() as patch:
        made = Rig(trainer, patch)
        made.standby.release()
        yield made
        made.driver.taken, made.driver.before_map = 0, lambda: None
        rlpatch.revert()
        assert made.driver.used() == made.total and not made.asleep()
        for data in made.allocator.pointer_to_data.values():  # its own sleep mode can let it go
            cumem.unmap_and_release(data.handle)
        assert not made.driver.mapped


@pytest.fixture(autouse=True)
def calm(rig: Rig) -> Iterator[None]:
    """Every test finds the cache released, and the device to itself."""
    rig.driver.taken, rig.driver.before_map = 0, lambda: None
    assert rig.standby.released and not rig.driver.mapped and rig.asleep()
    rig.driver.log.clear()
    yield
    assert rig.standby.released and not rig.driver.mapped and rig.asleep()


def test_a_rollout_with_the_blocks_that_there_is_room_for(rig: Rig) -> None:
    whole = rig.tokens()
    assert rig.driver.log[0][0] == "map" and rig.untouched()
    assert sum(size for kind, _, size in rig.driver.log if kind == "map") == rig.total
    for share in (2, 4, 3):
        rig.driver.log.clear()
        rig.driver.taken = rig.total - rig.total // share
        rig.standby.restore()
        assert not rig.asleep() and rig.standby.blocks is not None
        usable = rig.standby.blocks.usable
        assert TOTAL // share - 4 <= usable <= TOTAL // share
        assert rig.standby.mechanism.resident_bytes() == rig.driver.used() <= rig.total // share
        assert rig.tokens() == whole and rig.untouched()
        mapped = [entry[1:] for entry in rig.driver.log if entry[0] == "map"]
        assert sorted(mapped) == sorted(entry[1:] for entry in rig.driver.log if entry[0] == "unmap")
        (pair,) = rlpatch.status().pairs
        assert pair["standby"]["kv_blocks"] == {"usable": usable, "total": TOTAL}
    rig.driver.taken = 0
    assert rig.tokens() == whole and rig.standby.blocks is not None and rig.standby.blocks.usable == TOTAL


def test_the_engine_touches_what_is_mapped(rig: Rig) -> None:
    """So that `untouched` can tell: with every block in use the end of the cache is written to, too."""
    rig.standby.restore()
    last = next(iter(rig.storages))
    memory = torch.empty(0, dtype=torch.uint8).set_(last)  # type: ignore[call-overload]
    assert not memory.any()
    rig.driver.mapped, kept = {}, rig.driver.mapped
    try:
        assert not rig.untouched()
    finally:
        rig.driver.mapped = kept
    rig.standby.release()


def test_no_room_at_all(rig: Rig) -> None:
    rig.driver.taken = rig.driver.capacity - KEPT  # type: ignore[operator]
    with pytest.raises(StandbyError, match=f"there is room for 0 of {TOTAL} blocks") as caught:
        rig.tokens()
    assert "intact" in str(caught.value) and rig.driver.log == []
    rig.driver.taken = 0
    assert len(rig.tokens(4)) == len(PROMPTS)


def test_too_few_blocks_for_a_request(rig: Rig) -> None:
    rig.standby.restore()
    rig.standby.release()
    rig.driver.taken = rig.total - rig.total // 20  # three blocks
    with pytest.raises(StandbyError, match=r"needs 4 KV blocks, and \d of 63 came back"):
        rig.tokens(100)
    rig.driver.taken = 0
    assert len(rig.tokens(100)[0]) == 100


def test_memory_that_another_process_takes_meanwhile(rig: Rig) -> None:
    """Between looking and mapping: half of the room goes as the first mapping is made."""

    def take() -> None:
        rig.driver.taken = rig.total // 2

    rig.driver.before_map = take
    whole = rig.tokens()
    assert rig.standby.blocks is not None and 2 < rig.standby.blocks.usable <= TOTAL // 2 and rig.untouched()
    rig.driver.taken, rig.driver.before_map = 0, lambda: None
    assert rig.tokens() == whole and rig.standby.blocks.usable == TOTAL


@pytest.mark.parametrize("share", [1, 2])
def test_a_driver_that_goes_on_failing(rig: Rig, share: int) -> None:
    rig.driver.taken = rig.total - rig.total // share
    calls = 0

    def fail() -> None:
        nonlocal calls
        calls += 1
        if calls % 2 == 0 or share == 1:
            raise RuntimeError("CUDA Error: out of memory")

    rig.driver.before_map = fail
    with pytest.raises(StandbyError, match="out of memory"):
        rig.tokens()
    assert 2 <= calls <= 2 * 3
    rig.driver.before_map = lambda: None
    assert len(rig.tokens(4)) == len(PROMPTS)


@pytest.mark.parametrize("when", ["before", "after"])
def test_upstreams_part_of_a_restore_fails(rig: Rig, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """Waking up raises after the pieces are mapped, before or after vLLM takes them for awake; it can be tried again."""
    rig.driver.taken = rig.total // 2
    front = type(rig.llm.llm_engine)
    original = front.wake_up

    def broken(self: Any, tags: Any = None) -> Any:
        if when == "after":
            original(self, tags)
        raise RuntimeError("something else")

    monkeypatch.setattr(front, "wake_up", broken)
    with pytest.raises(StandbyError, match="something else"):
        rig.standby.restore()
    assert rig.standby.released
    monkeypatch.setattr(front, "wake_up", original)
    assert len(rig.tokens(4)) == len(PROMPTS) and rig.untouched()
    assert rig.standby.blocks is not None and rig.standby.blocks.usable <= TOTAL // 2


def test_a_release_that_upstream_refuses_keeps_the_pieces(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.driver.taken = rig.total // 2
    rig.standby.restore()
    before = dict(rig.driver.mapped)
    front = type(rig.llm.llm_engine)
    where, name = (
        (front, "release_kv_cache_memory") if hasattr(front, "release_kv_cache_memory") else (Engine, "reset_caches")
    )

    def refuse(self: Any, **kwargs: Any) -> Any:
        raise RuntimeError("requires a completed pause first")

    original = getattr(where, name)
    monkeypatch.setattr(where, name, refuse)
    with pytest.raises(RuntimeError, match="completed pause"):
        rig.standby.release()
    assert rig.driver.mapped == before and not rig.standby.released and not rig.asleep()
    monkeypatch.setattr(where, name, original)
    assert len(rig.tokens(4)) == len(PROMPTS), "the engine goes on"
