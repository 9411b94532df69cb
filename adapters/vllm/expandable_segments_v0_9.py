"""Expandable segments for all that torch allocates outside of vLLM's memory pool (see `rlpatch.allocator`).

From 0.20.1 on the pool switches them off around itself (vllm-project/vllm#40812); before, vLLM asserts that they are off.
Delete when: torch's allocator expands its segments by default.
"""

from __future__ import annotations

from rlpatch.adapters.vllm._platform import on_cpu
from rlpatch.allocator import expand
from rlpatch.registry import Adapter
from rlpatch.relies import Relies

_SWITCH = "expandable_was_enabled"


def _relevant() -> str | None:
    if on_cpu():
        return "the engine does not run on CUDA"
    import inspect

    from vllm.device_allocator.cumem import CuMemAllocator

    if _SWITCH not in inspect.getsource(CuMemAllocator.use_memory_pool):
        return "this vLLM's memory pool does not go together with them"
    return None


ADAPTER = Adapter(
    capability="expandable_segments",
    library="vllm",
    versions=">=0.9.2,<0.34",
    module="vllm.entrypoints.llm",
    relevant=_relevant,
    provides=expand,
    relies_on=(
        Relies(
            "vllm.device_allocator.cumem:CuMemAllocator.use_memory_pool", contains=(_SWITCH,), versions=">=0.20.1,<0.34"
        ),
    ),
)
