"""The trainer's objects are out of the collector's sight while an engine is built; it rests in captures (0.9.2 to 0.11).

``GPUModelRunner.capture_model`` (v1/worker/gpu_model_runner.py) does nothing about the collector in 0.9.2 and freezes the
heap since 0.10.0, but leaves collecting on: a Triton kernel that is finalized during the capture invalidates the graph
(what upstream's own comment in 0.28 gives as the reason to switch it off). torch before 2.9 calls ``gc.collect()`` for
every ``torch.cuda.graph``, which is cheap with a frozen heap. ``EngineCore`` freezes the whole heap from 0.11.1 on.
Delete when: the oldest supported vLLM is 0.12.
"""

from __future__ import annotations

from rlpatch.adapters.vllm._collector import BUILD, CAPTURE_V1, SHUTDOWN, V2_RUNNER
from rlpatch.adapters.vllm._platform import has
from rlpatch.registry import Adapter
from rlpatch.relies import Relies


def _probe() -> str | None:
    return f"there is a second runner, {V2_RUNNER}" if has(V2_RUNNER) else None


ADAPTER = Adapter(
    capability="graph_capture_gc",
    library="vllm",
    versions=">=0.9.2,<0.12",
    module="vllm.entrypoints.llm",
    probe=_probe,
    patches=lambda context: [BUILD, SHUTDOWN, CAPTURE_V1],
    relies_on=(Relies("vllm.v1.engine.core_client:InprocClient.engine_core"),),
)
