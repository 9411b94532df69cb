"""KV standby before vLLM has one of its own: pause at level 0, release the KV allocations, keep everything else.

From 0.17 ``LLMEngine.sleep(level=0)`` pauses scheduling alone and ``wake_up(tags=["scheduling"])`` resumes it; higher
levels would take the weights along. Between the two the KV memory is let go directly (`_pool` on CUDA, resized storages
on CPU); see `_pool.settle` for what lives in it beside keys and values. Up to 0.20.0 expandable segments are refused.
Delete when: the oldest supported vLLM is 0.31.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlpatch.adapters.vllm._reach import AT_REST, IN_PART, PAUSED
from rlpatch.patching import Patch
from rlpatch.registry import Adapter, Context
from rlpatch.relies import Relies

if TYPE_CHECKING:
    from rlpatch.engine import Engine


class PausedStandby:
    """See `rlpatch.standby.Mechanism`."""

    def __init__(self, engine: Engine) -> None:
        from rlpatch.adapters.vllm._pool import kv_memory

        self.engine = engine
        self.memory = kv_memory(engine)

    def release(self) -> None:
        """Pause, forget caches, free."""
        front = self.engine.llm.llm_engine
        front.sleep(level=0)
        try:
            self.engine.reset_caches()
        except BaseException:
            front.wake_up(tags=["scheduling"])  # else the next generation never ends
            raise
        self.memory.free()

    def restore(self) -> int | None:
        """Allocate, re-initialise, resume."""
        from rlpatch.adapters.vllm._pool import settle

        blocks = self.memory.back()
        settle(self.engine, self.memory)
        self.engine.llm.llm_engine.wake_up(tags=["scheduling"])
        return blocks

    def hand_over(self) -> None:
        """See `rlpatch.standby.Mechanism`."""
        self.memory.hand_over()

    def resident_bytes(self) -> int:
        """Bytes of KV memory that are backed right now."""
        return self.memory.resident_bytes()


def _patches(context: Context) -> list[Patch]:
    from rlpatch.adapters.vllm._pieces import patches

    return patches()


def _probe() -> str | None:
    import inspect

    from vllm.v1.engine.core import EngineCore

    # not pause_scheduler: 0.16 has one, and its sleep(level=0) discards everything
    if "mode" not in inspect.signature(EngineCore.sleep).parameters:
        return "EngineCore.sleep has no level 0 that only pauses"
    return None if "tags" in inspect.signature(EngineCore.wake_up).parameters else "wake_up takes no tags"


def _relevant() -> str | None:
    from rlpatch.adapters.vllm._pool import expandable_segments_refused

    return expandable_segments_refused()


ADAPTER = Adapter(
    capability="standby",
    library="vllm",
    versions=">=0.17,<0.31",
    module="vllm.entrypoints.llm",
    probe=_probe,
    relevant=_relevant,
    provides=PausedStandby,
    patches=_patches,
    relies_on=(
        *AT_REST,
        *PAUSED,
        # _pool: on CUDA
        Relies("vllm.device_allocator.cumem:CuMemAllocator.get_instance"),
        Relies("vllm.device_allocator.cumem:CuMemAllocator.pointer_to_data"),
        Relies("vllm.device_allocator.cumem:AllocationData", parameters=("handle",)),
        *IN_PART,
        *(
            Relies(f"vllm.v1.worker.{runner}:GPUModelRunner.post_kv_cache_wake_up", versions=">=0.21,<0.29")
            for runner in ("gpu_model_runner", "gpu.model_runner")
        ),
    ),
)
