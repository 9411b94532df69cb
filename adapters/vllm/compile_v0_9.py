"""Compile settings before ``mode`` (0.9.2 to 0.11.0).

``LLM.__init__`` takes a ``CompilationConfig`` (``vllm/config.py``): ``level``, ``use_inductor``, ``use_cudagraph``,
``full_cuda_graph``. V1 sets ``level`` PIECEWISE whatever was given unless eager is enforced, so that there is no way to
have graphs without compilation; ``cudagraph_mode`` (0.10.1, vllm-project/vllm#20059) can capture whole decode steps, but
``VllmConfig`` still compiles whatever is not eager. Single ``compile_sizes`` are autotuned in 0.9 and 0.10 without a
switch, therefore they are not offered.
Delete when: the oldest supported vLLM is 0.11.1.
"""

from __future__ import annotations

from rlpatch.adapters.vllm import _compilation as era
from rlpatch.compilation.dialect import Changes
from rlpatch.registry import Adapter


def _inductor(value: bool) -> Changes:
    return Changes(config={"use_inductor": value})


TERMS: era.Terms = {"capture sizes": era.capture_sizes, "inductor": _inductor}

ADAPTER = Adapter(
    capability="compile",
    library="vllm",
    versions=">=0.9.2,<0.11.1",
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
        sampler_warmup=era.NO_WARM_UP,
        attention_splits=era.NO_SPLITS,
        launch_overlap=era.NO_OVERLAP,
        static_sizes="this vLLM tunes every single size by coordinate descent, which takes minutes",
        aot=era.NO_AOT,
        memory_plan=era.NO_PLAN,
    ),
    relies_on=era.relies(fields=("cudagraph_capture_sizes", "use_inductor", "level")),
)
