"""Compile settings with ``mode`` (0.11.1 to 0.15).

``CompilationConfig`` moved to ``vllm/config/compilation.py``; ``mode`` and ``cudagraph_mode`` are independent (full graphs
"are supported with and without compilation"; ``level`` is an alias until 0.17), ``use_cudagraph`` and ``full_cuda_graph``
are gone. New: ``cudagraph_specialize_lora``, combo kernels (switched on with torch >= 2.9 unless
``inductor_compile_config`` names them), AOT compilation, and variables for how single sizes are tuned.
FlashInfer's autotuning has no switch of its own yet, optimization levels (0.12) no neighbour without them to fall back on.
Delete when: the oldest supported vLLM is 0.16.
"""

from __future__ import annotations

from rlpatch.adapters.vllm import _compilation as era
from rlpatch.registry import Adapter
from rlpatch.relies import Relies

TERMS: era.Terms = {
    "capture sizes": era.capture_sizes,
    "graphs without adapter": era.graphs_without_adapter,
    "combo kernels": era.combo_kernels,
    "compiled": era.uncompiled,
    "inductor": era.eager_backend,
    "static sizes": era.static_sizes,
    "aot": era.aot,
}
FIELDS = (
    "cudagraph_capture_sizes", "cudagraph_specialize_lora", "mode", "cudagraph_mode", "backend", "compile_sizes",
)  # fmt: skip
VARIABLES = ("VLLM_USE_AOT_COMPILE", *era.AUTOTUNE_VARIABLES)
OTHERS = (Relies("vllm.config:CompilationMode.NONE"), Relies("vllm.config:CUDAGraphMode.FULL_DECODE_ONLY"))

ADAPTER = Adapter(
    capability="compile",
    library="vllm",
    versions=">=0.11.1,<0.16",
    module="vllm.entrypoints.llm",
    probe=era.probe(TERMS),
    patches=era.patches,
    provides=era.dialect(
        TERMS,
        kernel_autotune=era.NO_AUTOTUNE,
        optimization=era.NO_LEVELS,
        sampler_warmup=era.NO_WARM_UP,
        attention_splits=era.NO_SPLITS,
        launch_overlap=era.NO_OVERLAP,
        whole_artifact="this vLLM has no such artifact before 0.15, and it is young there",
        memory_plan=era.NO_PLAN,
    ),
    relies_on=era.relies(fields=FIELDS, variables=VARIABLES, others=OTHERS),
)
