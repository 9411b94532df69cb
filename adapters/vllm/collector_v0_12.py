"""The garbage collector rests while either runner captures its CUDA graphs (0.12 to 0.29).

``v1/worker/gpu_model_runner.py`` freezes the heap for its capture and switches the collector off since 0.28 only;
``v1/worker/gpu/model_runner.py`` (Model Runner V2, first in 0.12, the default for dense models from 0.22) collects once
before and does neither. Both are wrapped; 0.30 has ``freeze_gc_for_cudagraph_capture`` for both.
``EngineCore`` freezes the whole heap when it is built, the worker since 0.23 as well: the trainer's objects thaw again.
Delete when: the oldest supported vLLM is 0.30.
"""

from __future__ import annotations

from rlpatch.adapters.vllm._collector import BUILD, CAPTURE_V1, CAPTURE_V2, SHUTDOWN, V2_RUNNER, rests_itself
from rlpatch.adapters.vllm._platform import has
from rlpatch.registry import Adapter
from rlpatch.relies import Relies


def _probe() -> str | None:
    if rests_itself():
        return "vLLM rests the collector itself"
    return None if has(V2_RUNNER) else f"there is no {V2_RUNNER}"


ADAPTER = Adapter(
    capability="graph_capture_gc",
    library="vllm",
    versions=">=0.12,<0.30",
    module="vllm.entrypoints.llm",
    probe=_probe,
    patches=lambda context: [BUILD, SHUTDOWN, CAPTURE_V1, CAPTURE_V2],
    relies_on=(Relies("vllm.v1.engine.core_client:InprocClient.engine_core"),),
)
