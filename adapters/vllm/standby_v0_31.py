"""KV standby through vLLM's own release_kv_cache_memory (0.31 and later).

``LLM.release_kv_cache_memory()`` → ``EngineCore`` (checks a completed pause, resets prefix, multimodal and encoder
caches) → ``Executor.discard(("kv_cache",))`` → ``Worker.discard``: weights stay mapped. It wants ``LLM.sleep(level=0)``
first and an engine at rest: called right after ``generate()`` it raises "requires a completed pause first", because
finished ids are not flushed and, with asynchronous scheduling, a batch is still in ``batch_queue``; `rlpatch.standby`
drains before it calls. Back: ``LLM.wake_up(tags=["kv_cache"])``, which resumes scheduling once all is resident. The two
keep upstream's books, while the memory itself is mapped and unmapped by `_pieces`: ``wake_up`` would map all or nothing and
with one handle, which is slow, and ``discard`` would wait for the device, which unfolds a LoRA meanwhile. So the pool is
told that its allocations are awake before it wakes them, and that they sleep before it discards them.
On CPU ``CPUWorker.discard`` raises "Selective discard is not supported on CPU." and ``CPUWorker.wake_up`` does nothing;
there the two are wrapped so that the KV storages are resized to nothing and back, and the process's memory really falls.
Delete when: the oldest supported vLLM is 0.31 and its release drains by itself; then the trainer can call it directly.
The CPU part: when vLLM's CPU worker implements discard.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from rlpatch.adapters.vllm._platform import on_cpu
from rlpatch.adapters.vllm._reach import AT_REST, IN_PART, PAUSED
from rlpatch.patching import Patch
from rlpatch.registry import Adapter, Context
from rlpatch.relies import Relies

if TYPE_CHECKING:
    from rlpatch.adapters.vllm._pieces import Pieces
    from rlpatch.engine import Engine


class NativeStandby:
    """See `rlpatch.standby.Mechanism`."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._allocations: list[Any] = []  # of the pool's, on CUDA
        self._pieces: Pieces | None = None
        if engine.device.type == "cuda":
            from vllm.device_allocator.cumem import CuMemAllocator

            from rlpatch.adapters.vllm._pieces import as_made

            found = CuMemAllocator.get_instance().pointer_to_data.values()
            self._allocations = [data for data in found if data.tag == "kv_cache"]
            self._pieces = as_made(self._allocations)

    def release(self) -> None:
        """Pause, then discard the ``kv_cache`` tag."""
        from rlpatch.adapters.vllm._pool import mark

        front = self.engine.llm.llm_engine
        front.sleep(level=0)
        mark(self._allocations, True)
        try:
            front.release_kv_cache_memory()
        except BaseException:
            mark(self._allocations, False)
            asleep = "kv_cache" in self.engine.core.model_executor.sleeping_tags
            front.wake_up(tags=["kv_cache" if asleep else "scheduling"])  # else the next generation never ends
            raise
        if self._pieces is not None:
            from rlpatch.adapters.vllm._pieces import take_out

            take_out(self._pieces, self._allocations)
            self._pieces = None

    def restore(self) -> int | None:
        """Map the ``kv_cache`` tag again, or what there is room for; scheduling resumes with it."""
        from rlpatch.adapters.vllm._pool import mark
        from rlpatch.standby import make_room

        make_room(self.engine.device)
        if self._allocations and self._pieces is None:  # else a restore was interrupted when all was mapped
            from rlpatch.adapters.vllm._pieces import map_what_fits

            pieces = map_what_fits(self.engine, self._allocations)
            mark(self._allocations, False)
            self._pieces = pieces
        try:
            self.engine.llm.llm_engine.wake_up(tags=["kv_cache"])
        except BaseException:
            if self._pieces is not None and "kv_cache" in self.engine.core.model_executor.sleeping_tags:
                from rlpatch.adapters.vllm._pieces import take_out

                mark(self._allocations, True)
                take_out(self._pieces, self._allocations)
                self._pieces = None
            raise
        return self._pieces.blocks if self._pieces is not None else None

    def hand_over(self) -> None:
        """Map it again as vLLM's pool would have done it."""
        if self._pieces is not None:
            from rlpatch.adapters.vllm._pieces import in_the_pools_handles

            self._pieces = in_the_pools_handles(self._pieces, self._allocations)

    def resident_bytes(self) -> int:
        """Bytes of KV memory that are backed right now."""
        if self._allocations:
            return self._pieces.resident_bytes() if self._pieces is not None else 0
        return sum(tensor.untyped_storage().nbytes() for tensor in self.engine.kv_tensors())


def _patches(context: Context) -> list[Patch]:
    if not on_cpu():
        from rlpatch.adapters.vllm._pieces import patches

        return patches()
    from rlpatch import phases
    from rlpatch.standby import ResizedStorages

    released: weakref.WeakKeyDictionary[Any, ResizedStorages] = weakref.WeakKeyDictionary()

    def discard(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tags = kwargs.get("tags", args[0] if args else ())
        pair = phases.of_worker(instance)
        if pair is None or pair.engine is None or set(tags) != {"kv_cache"}:
            return wrapped(*args, **kwargs)
        storages = ResizedStorages(pair.engine)
        storages.free()
        released[instance] = storages
        return None

    def wake_up(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tags = kwargs.get("tags", args[0] if args else None)
        if instance not in released or (tags is not None and "kv_cache" not in tags):
            return wrapped(*args, **kwargs)
        released.pop(instance).back()
        return None

    worker = "vllm.v1.worker.cpu_worker"
    return [Patch(worker, "CPUWorker.discard", discard), Patch(worker, "CPUWorker.wake_up", wake_up)]


def _probe() -> str | None:
    from vllm.entrypoints.llm import LLM

    return None if hasattr(LLM, "release_kv_cache_memory") else "LLM has no release_kv_cache_memory"


ADAPTER = Adapter(
    capability="standby",
    library="vllm",
    versions=">=0.31,<0.34",
    module="vllm.entrypoints.llm",
    probe=_probe,
    provides=NativeStandby,
    patches=_patches,
    relies_on=(
        *AT_REST,
        *PAUSED,
        Relies("vllm.v1.engine.llm_engine:LLMEngine.release_kv_cache_memory"),
        Relies("vllm.v1.engine.core:EngineCore.release_kv_cache_memory", fingerprints=("67a47c31f752",)),
        Relies("vllm.v1.engine.core:EngineCore.model_executor"),
        Relies("vllm.v1.executor.abstract:Executor.sleeping_tags"),
        Relies("vllm.v1.executor.abstract:Executor.discard", contains=("self.sleeping_tags |= tags_to_discard",)),
        *IN_PART,
        Relies("vllm.device_allocator.cumem:CuMemAllocator.get_instance"),
        Relies("vllm.device_allocator.cumem:CuMemAllocator.pointer_to_data"),
        Relies("vllm.device_allocator.cumem:AllocationData", parameters=("handle", "tag", "is_asleep")),
        Relies("vllm.device_allocator.cumem:CuMemAllocator.wake_up", contains=("not data.is_asleep",)),
        Relies(
            "vllm.device_allocator.cumem:CuMemAllocator.discard",
            contains=("data.is_asleep", "unmap_and_release(data.handle)"),
        ),
        Relies("vllm.v1.worker.cpu_worker:CPUWorker.discard", positional=("tags",)),
        Relies("vllm.v1.worker.cpu_worker:CPUWorker.wake_up", positional=("tags",)),
    ),
)
