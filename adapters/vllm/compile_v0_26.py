"""Compile settings with a startup plan (0.26 to 0.33).

``v1/worker/startup_plan.py`` keeps the measured size of the KV cache under ``VLLM_CACHE_ROOT`` and skips the measurement
when everything it depends on is the same and no less memory is free (``VLLM_ENABLE_STARTUP_PLAN``). The rest is as in
0.17.
Delete when: vLLM has profiles of its own for engines that live beside a trainer.
"""

from __future__ import annotations

from rlpatch.adapters.vllm import _compilation as era
from rlpatch.adapters.vllm import compile_v0_11_1 as first
from rlpatch.adapters.vllm import compile_v0_16 as variables
from rlpatch.adapters.vllm import compile_v0_17 as before
from rlpatch.registry import Adapter

TERMS: era.Terms = {**before.TERMS, "memory plan": era.memory_plan}

ADAPTER = Adapter(
    capability="compile",
    library="vllm",
    versions=">=0.26,<0.34",
    module="vllm.entrypoints.llm",
    probe=era.probe(TERMS),
    patches=era.patches_of_a_sampler,
    provides=era.dialect(TERMS),
    relies_on=era.relies(
        fields=first.FIELDS,
        arguments=before.ARGUMENTS,
        variables=(*variables.VARIABLES, "VLLM_ENABLE_STARTUP_PLAN"),
        others=(*first.OTHERS, *era.SAMPLER, *era.SPLITS),
    ),
)
