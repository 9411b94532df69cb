"""Compile settings with a sampler that is warmed up (0.17 to 0.25).

Model Runner V2 samples with a Triton kernel per feature, and ``v1/worker/gpu/warmup.py`` has all of them compiled before
the first request: ``Worker.compile_or_warm_up_model`` → ``warmup_kernels`` → requests with
``SamplingParams.for_sampler_warmup()``: top-k with top-p, min-p, penalties, bias, bad words, log-probs of prompts. A
rollout asks for few of them, often for none but a temperature and log-probs. What it does not ask for is compiled when
somebody does: once, and outside of any CUDA graph, for the graphs hold the model alone (a draft model's excepted, whose
engines are left alone). The warm-up runs the model as before, so that workspaces grow as before. From 0.33 on the memory
profile samples with the same parameters, and then counts what rollouts need.
``VLLM_USE_V2_MODEL_RUNNER`` chooses that runner, from 0.22 on ``VllmConfig.use_v2_model_runner`` by the model; V1 warms its
sampler up after the graphs and without these parameters.
``attention_config`` is there since 0.13, Inductor's ``triton.enable_pdl`` where torch has it; both were tried
with 0.25.1 alone.
Delete when: the oldest supported vLLM is 0.26.
"""

from __future__ import annotations

from rlpatch.adapters.vllm import _compilation as era
from rlpatch.adapters.vllm import compile_v0_11_1 as first
from rlpatch.adapters.vllm import compile_v0_16 as before
from rlpatch.registry import Adapter

TERMS: era.Terms = {
    **before.TERMS,
    "sampler warmup": era.plain_warm_up,
    "attention splits": era.attention_splits,
    "launch overlap": era.launch_overlap,
}
ARGUMENTS = (*before.ARGUMENTS, "attention_config")

ADAPTER = Adapter(
    capability="compile",
    library="vllm",
    versions=">=0.17,<0.26",
    module="vllm.entrypoints.llm",
    probe=era.probe(TERMS),
    patches=era.patches_of_a_sampler,
    provides=era.dialect(TERMS, memory_plan=era.NO_PLAN),
    relies_on=era.relies(
        fields=first.FIELDS,
        arguments=ARGUMENTS,
        variables=before.VARIABLES,
        others=(*first.OTHERS, *era.SAMPLER, *era.SPLITS),
    ),
)
