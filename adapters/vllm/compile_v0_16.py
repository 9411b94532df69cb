"""Compile settings with a ``KernelConfig`` (0.16).

``EngineArgs.enable_flashinfer_autotune`` (also a field of ``kernel_config``; one of the two) switches off what
``kernel_warmup`` runs on Hopper and Blackwell for every model, and ``optimization_level`` (vllm-project/vllm#26847, since
0.12) sets what is not given. ``VLLM_USE_MEGA_AOT_ARTIFACT`` comes from 0.15. ``level`` ends with 0.17.
Delete when: the oldest supported vLLM is 0.17.
"""

from __future__ import annotations

from rlpatch.adapters.vllm import _compilation as era
from rlpatch.adapters.vllm import compile_v0_11_1 as before
from rlpatch.registry import Adapter

TERMS: era.Terms = {
    **before.TERMS,
    "kernel autotune": era.kernel_autotune,
    "optimization": era.optimization,
    "whole artifact": era.whole_artifact,
}
ARGUMENTS = ("enable_flashinfer_autotune", "kernel_config", "optimization_level")
VARIABLES = (*before.VARIABLES, "VLLM_USE_MEGA_AOT_ARTIFACT")

ADAPTER = Adapter(
    capability="compile",
    library="vllm",
    versions=">=0.16,<0.17",
    module="vllm.entrypoints.llm",
    probe=era.probe(TERMS),
    patches=era.patches,
    provides=era.dialect(
        TERMS,
        sampler_warmup=era.NO_WARM_UP,
        memory_plan=era.NO_PLAN,
        attention_splits=era.NO_SPLITS,
        launch_overlap=era.NO_OVERLAP,
    ),
    relies_on=era.relies(fields=before.FIELDS, arguments=ARGUMENTS, variables=VARIABLES, others=before.OTHERS),
)
