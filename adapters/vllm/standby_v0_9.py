"""KV standby before the engine can pause: release the KV allocations of an engine at rest (0.9.2 to 0.16).

``LLM.sleep`` → ``EngineCore.sleep`` → ``Executor.sleep`` → ``Worker.sleep(level)`` → ``CuMemAllocator.sleep(("weights",)
if level == 1 else ())``: every level unmaps the weights too, there is no level 0, and ``CuMemAllocator.wake_up`` maps
what is mapped already. So none of it is called: the engine runs in this process and steps in ``LLM.generate`` alone,
which restores the memory first. ``LLMEngine.step`` refuses to run a request while the memory is out (``LLM.encode``,
``beam_search``, a hand-written loop): its kernels would touch unmapped addresses and end the process.
The encoder cache is kept from request to request since 0.10.2 and can be reset since 0.16; in between it is emptied here,
because its vectors come from an older policy.
Not for 0.10 and 0.14: see ``standby_v0_10.py`` and ``standby_v0_14.py``. Read, never run: these releases want torch 2.7
to 2.9.
Delete when: the oldest supported vLLM is 0.17.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlpatch.adapters.vllm._reach import AT_REST, IN_PART
from rlpatch.errors import StandbyError
from rlpatch.patching import Patch
from rlpatch.registry import Adapter, Context
from rlpatch.relies import Relies

if TYPE_CHECKING:
    from rlpatch.engine import Engine


class RestingStandby:
    """See `rlpatch.standby.Mechanism`.

    Raises:
        StandbyError: the engine is a V0 one, or runs in another process.
    """

    def __init__(self, engine: Engine) -> None:
        from rlpatch.adapters.vllm._pool import kv_memory

        self.engine = engine
        self._core = engine.core
        self.memory = kv_memory(engine)

    def release(self) -> None:
        """Forget caches, free."""
        self.engine.reset_caches()
        self._forget_encoder_outputs()
        self.memory.free()

    def _forget_encoder_outputs(self) -> None:
        manager = getattr(self._core.scheduler, "encoder_cache_manager", None)
        if manager is None or hasattr(manager, "reset") or not hasattr(manager, "freeable"):
            return
        manager.cached.clear()
        manager.freeable.clear()
        manager.freed.clear()
        manager.num_free_slots = manager.num_freeable_slots = manager.cache_size
        self.engine.runner.encoder_cache.clear()

    def restore(self) -> int | None:
        """Allocate, re-initialise."""
        from rlpatch.adapters.vllm._pool import settle

        blocks = self.memory.back()
        settle(self.engine, self.memory)
        return blocks

    def hand_over(self) -> None:
        """See `rlpatch.standby.Mechanism`."""
        self.memory.hand_over()

    def resident_bytes(self) -> int:
        """Bytes of KV memory that are backed right now."""
        return self.memory.resident_bytes()


def _step(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    from rlpatch import phases

    for pair in phases.live():
        out = pair.standby is not None and pair.standby.released
        if out and pair.engine is not None and pair.engine.llm.llm_engine is instance:
            raise StandbyError(
                "the engine was asked to run a request while its KV cache is released; generate with LLM.generate or "
                "LLM.chat, which restore it, or apply(standby=False)"
            )
    return wrapped(*args, **kwargs)


def _patches(context: Context) -> list[Patch]:
    from rlpatch.adapters.vllm._pieces import patches

    return [Patch("vllm.v1.engine.llm_engine", "LLMEngine.step", _step), *patches()]


def _probe() -> str | None:
    import inspect

    from vllm.v1.engine.core import EngineCore

    if "mode" in inspect.signature(EngineCore.sleep).parameters:
        return "EngineCore.sleep has a level 0 that only pauses"
    return None if "tags" in inspect.signature(EngineCore.wake_up).parameters else "wake_up takes no tags"


def _relevant() -> str | None:
    from rlpatch.adapters.vllm._pool import expandable_segments_refused

    return expandable_segments_refused()


ADAPTER = Adapter(
    capability="standby",
    library="vllm",
    versions=">=0.9.2,<0.17,!=0.10.*,!=0.14.*",
    module="vllm.entrypoints.llm",
    probe=_probe,
    relevant=_relevant,
    provides=RestingStandby,
    patches=_patches,
    relies_on=(
        *AT_REST,
        Relies("vllm.v1.engine.core:EngineCore.wake_up", positional=("tags",)),
        Relies("vllm.v1.core.sched.scheduler:Scheduler.encoder_cache_manager"),
        Relies("vllm.device_allocator.cumem:CuMemAllocator.get_instance"),
        Relies("vllm.device_allocator.cumem:CuMemAllocator.pointer_to_data"),
        Relies("vllm.device_allocator.cumem:AllocationData", parameters=("handle",)),
        *IN_PART,
    ),
)
