"""KV standby before vLLM has one of its own: pause at level 0, release the KV allocations, keep everything else.

From 0.17 ``LLMEngine.sleep(level=0)`` pauses scheduling alone and ``wake_up(tags=["scheduling"])`` resumes it; higher
levels would take the weights along. Between the two the KV memory is let go directly (`_pool` on CUDA, resized storages
on CPU). ``model_runner.post_kv_cache_wake_up`` (0.22–0.28) re-initialises what lives in KV memory: fp8 scales (V1
runner), block-table layout tensors (V2 runner).
Delete when: the oldest supported vLLM is 0.31.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlpatch.registry import Adapter

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
        self.engine.llm.llm_engine.sleep(level=0)
        self.engine.reset_caches()
        self.memory.free()

    def restore(self) -> None:
        """Allocate, re-initialise, resume."""
        self.memory.back()
        after = getattr(self.engine.runner, "post_kv_cache_wake_up", None)
        if after is not None:
            after()
        self.engine.llm.llm_engine.wake_up(tags=["scheduling"])

    def resident_bytes(self) -> int:
        """Bytes of KV memory that are backed right now."""
        return self.memory.resident_bytes()


def _probe() -> str | None:
    import inspect

    from vllm.v1.engine.core import EngineCore

    if not hasattr(EngineCore, "pause_scheduler"):
        return "EngineCore has no pause_scheduler (no sleep level 0)"
    return None if "tags" in inspect.signature(EngineCore.wake_up).parameters else "wake_up takes no tags"


ADAPTER = Adapter(
    capability="standby",
    library="vllm",
    versions=">=0.17,<0.31",
    module="vllm.entrypoints.llm",
    probe=_probe,
    provides=PausedStandby,
)
