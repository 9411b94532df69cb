"""KV standby through vLLM's own release_kv_cache_memory (0.31 and later).

``LLM.release_kv_cache_memory()`` → ``EngineCore`` (checks a completed pause, resets prefix, multimodal and encoder
caches) → ``Executor.discard(("kv_cache",))`` → ``Worker.discard``: weights stay mapped. It wants ``LLM.sleep(level=0)``
first and an engine at rest: called right after ``generate()`` it raises "requires a completed pause first", because
finished ids are not flushed and, with asynchronous scheduling, a batch is still in ``batch_queue``; `rlpatch.standby`
drains before it calls. Back: ``LLM.wake_up(tags=["kv_cache"])``, which resumes scheduling once all is resident. It maps
all or nothing: where the device has no room for all, the first blocks are mapped beforehand (`_pieces`) and the pool is
told that its allocations are awake, so that ``wake_up`` finds nothing to map and does the rest; before the next release
it is told that they sleep, so that ``discard`` unmaps nothing, and the pieces go.
On CPU ``CPUWorker.discard`` raises "Selective discard is not supported on CPU." and ``CPUWorker.wake_up`` does nothing;
there the two are wrapped so that the KV storages are resized to nothing and back, and the process's memory really falls.
Delete when: the oldest supported vLLM is 0.31 and its release drains by itself; then the trainer can call it directly.
The CPU part: when vLLM's CPU worker implements discard.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rlpatch.adapters.vllm._platform import on_cpu
from rlpatch.adapters.vllm._reach import AT_REST, IN_PART, PAUSED
from rlpatch.patching import Patch
from rlpatch.registry import Adapter, Context
from rlpatch.relies import Relies

if TYPE_CHECKING:
    from rlpatch.adapters.vllm._pieces import Prefix
    from rlpatch.engine import Engine


class NativeStandby:
    """See `rlpatch.standby.Mechanism`."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        # The pool's accounting differs by device; what counts for us is whether the executor holds the tag mapped.
        self._bytes = sum(tensor.untyped_storage().nbytes() for tensor in engine.kv_tensors())

        self._prefix: Prefix | None = None
        self._partly: list[Any] = []  # the pool's allocations that `_prefix` is a part of

    def release(self) -> None:
        """Pause, then discard the ``kv_cache`` tag."""
        front = self.engine.llm.llm_engine
        front.sleep(level=0)
        if self._prefix is None:
            front.release_kv_cache_memory()
            return
        with self._marked(True):
            front.release_kv_cache_memory()
        self._prefix.unmap()
        self._prefix = None

    def restore(self) -> int | None:
        """Map the ``kv_cache`` tag again, or what there is room for; scheduling resumes with it."""
        from rlpatch.standby import make_room

        make_room(self.engine.device)
        if self.engine.device.type != "cuda":
            self._wake_up()
            return None
        from rlpatch.adapters.vllm._pieces import fits, map_prefix

        cause: RuntimeError | None = None
        if fits(self.engine.device, self._asleep()):
            try:
                self._wake_up()
            except RuntimeError as error:
                if "kv_cache" not in self.engine.core.model_executor.sleeping_tags:
                    raise  # all of it came back
                cause = error  # somebody else was faster
                self._pool().discard(("kv_cache",))  # what was mapped of it
            else:
                return None
        self._partly = self._asleep()
        prefix = map_prefix(self.engine, self._partly, cause)
        try:
            with self._marked(False):
                self._wake_up()
        except BaseException:
            prefix.unmap()
            raise
        self._prefix = prefix
        return prefix.blocks

    def _wake_up(self) -> None:
        self.engine.llm.llm_engine.wake_up(tags=["kv_cache"])

    def _pool(self) -> Any:
        from vllm.device_allocator.cumem import CuMemAllocator

        return CuMemAllocator.get_instance()

    def _asleep(self) -> list[Any]:
        return [data for data in self._pool().pointer_to_data.values() if data.tag == "kv_cache" and data.is_asleep]

    @contextlib.contextmanager
    def _marked(self, asleep: bool) -> Iterator[None]:
        """Tell the pool that what is mapped in part sleeps or not; taken back if the block fails."""
        from rlpatch.adapters.vllm._pool import mark

        mark(self._partly, asleep)
        try:
            yield
        except BaseException:
            mark(self._partly, not asleep)
            raise

    def resident_bytes(self) -> int:
        """Bytes of KV memory that are backed right now."""
        if self.engine.device.type == "cpu":
            return sum(tensor.untyped_storage().nbytes() for tensor in self.engine.kv_tensors())
        if self._prefix is not None:
            return self._prefix.resident_bytes()
        asleep = "kv_cache" in self.engine.core.model_executor.sleeping_tags
        return 0 if asleep else self._bytes


def _patches(context: Context) -> list[Patch]:
    if not on_cpu():
        return []
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
