"""Compile settings with ``cudagraph_mode`` beside ``level`` (0.10.1 to 0.11.0).

As before it; ``cudagraph_mode`` (vllm-project/vllm#20059) can capture whole decode steps, but ``VllmConfig`` still
compiles whatever is not eager. Single ``compile_sizes`` are autotuned in 0.10 without a switch, so they are not offered.
Delete when: the oldest supported vLLM is 0.11.1.
"""

from __future__ import annotations

from rlpatch.adapters.vllm import _compilation as era
from rlpatch.adapters.vllm.compile_v0_9 import TERMS
from rlpatch.registry import Adapter

ADAPTER = Adapter(
    capability="compile",
    library="vllm",
    versions=">=0.10.1,<0.11.1",
    module="vllm.entrypoints.llm",
    probe=era.probe(TERMS),
    patches=era.patches,
    provides=era.dialect(
        TERMS,
        graphs_without_adapter=era.NO_LORA_GRAPHS,
        kernel_autotune=era.NO_AUTOTUNE,
        combo_kernels=era.NO_COMBO,
        compiled="this vLLM has no CUDA graphs without compilation that were read to work",
        optimization=era.NO_LEVELS,
        static_sizes="vLLM 0.10 autotunes every single size, which takes minutes",
        aot=era.NO_AOT,
        memory_plan=era.NO_PLAN,
    ),
    relies_on=era.relies(fields=("cudagraph_capture_sizes", "use_inductor", "level", "cudagraph_mode")),
)
