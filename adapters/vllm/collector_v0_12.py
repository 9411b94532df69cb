"""The trainer's objects are out of the collector's sight while an engine is built; it rests during captures (0.12 to 0.33).

``v1/worker/gpu_model_runner.py`` freezes the heap for its capture and switches the collector off since 0.28 only;
``v1/worker/gpu/model_runner.py`` (Model Runner V2, first in 0.12, the default for dense models from 0.22) collects once
before and does neither. 0.30 has ``utils/gc_utils.freeze_gc_for_cudagraph_capture`` for both, which thaws all frozen
objects when it ends: both runners are wrapped there, too, so that what is frozen for the build is frozen again.
``EngineCore.__init__`` ends with ``freeze_gc_heap``, since 0.23 the worker's warm-up as well: in the trainer's process that
keeps whatever garbage there is by then from being collected, cyclic modules with their tensors among it, until the engine
shuts down. All thaws when the engine is built.
Delete when: vLLM neither freezes nor walks the heap of a process that it shares.
"""

from __future__ import annotations

from rlpatch.adapters.vllm._collector import BUILD, CAPTURE_V1, CAPTURE_V2, SHUTDOWN, V2_RUNNER
from rlpatch.adapters.vllm._platform import has
from rlpatch.registry import Adapter
from rlpatch.relies import Relies


def _probe() -> str | None:
    return None if has(V2_RUNNER) else f"there is no {V2_RUNNER}"


ADAPTER = Adapter(
    capability="graph_capture_gc",
    library="vllm",
    versions=">=0.12,<0.34",
    module="vllm.entrypoints.llm",
    probe=_probe,
    patches=lambda context: [BUILD, SHUTDOWN, CAPTURE_V1, CAPTURE_V2],
    relies_on=(Relies("vllm.v1.engine.core_client:InprocClient.engine_core"),),
)
