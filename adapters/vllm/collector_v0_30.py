"""The trainer's objects thaw after the engine is built; vLLM rests the collector during capture itself (0.30 and later).

``utils/gc_utils.freeze_gc_for_cudagraph_capture`` serves both runners. What is left is ``freeze_gc_heap``, at the end of
``EngineCore.__init__`` and of the worker's warm-up: in the trainer's process it keeps whatever garbage the trainer has by
then from ever being collected, its cyclic modules with their tensors among it, until the engine shuts down.
Delete when: vLLM does not freeze the heap of a process that it shares.
"""

from __future__ import annotations

from rlpatch.adapters.vllm._collector import BUILD, SHUTDOWN, rests_itself
from rlpatch.registry import Adapter
from rlpatch.relies import Relies


def _probe() -> str | None:
    return None if rests_itself() else "vLLM does not rest the collector itself"


ADAPTER = Adapter(
    capability="graph_capture_gc",
    library="vllm",
    versions=">=0.30,<0.34",
    module="vllm.entrypoints.llm",
    probe=_probe,
    patches=lambda context: [BUILD, SHUTDOWN],
    relies_on=(
        Relies("vllm.v1.engine.core_client:InprocClient.engine_core"),
        Relies("vllm.utils.gc_utils:freeze_gc_for_cudagraph_capture"),
    ),
)
