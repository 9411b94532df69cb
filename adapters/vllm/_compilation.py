"""What the eras of vLLM's ``CompilationConfig`` have in common, term by term; an era's file says which terms it has."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from rlpatch.compilation.dialect import Changes, Dialect, Hook, Surface
from rlpatch.patching import Patch
from rlpatch.registry import Context
from rlpatch.relies import Relies


def surface() -> Surface:
    """The installed vLLM's names. ``LLM.__init__`` hands what it does not know to ``EngineArgs``."""
    from vllm import LLM, envs
    from vllm.config import CompilationConfig
    from vllm.engine.arg_utils import EngineArgs

    arguments = {field.name for field in dataclasses.fields(EngineArgs)}
    arguments |= set(inspect.signature(LLM.__init__).parameters)
    return Surface(
        CompilationConfig,
        frozenset(arguments),
        frozenset(envs.environment_variables),
        # ``enable_envs_cache()``, after the first engine of a process (0.11.1 and later)
        hasattr(envs.__getattr__, "cache_clear"),
    )


def capture_sizes(value: list[int]) -> Changes:
    return Changes(config={"cudagraph_capture_sizes": list(value)})


def graphs_without_adapter(value: bool) -> Changes:
    return Changes(config={"cudagraph_specialize_lora": value})


def combo_kernels(value: str) -> Changes:
    """``CompilationConfig.__post_init__`` switches them on where they work (torch >= 2.9, GPUs), with the benchmark, unless
    one of the two options is given; where it does not, neither is given."""
    return Changes(
        inductor={"combo_kernels": value == "unbenchmarked", "benchmark_combo_kernel": False},
        upon={"combo_kernels": True},
    )


def uncompiled(value: bool) -> Changes:
    """``mode`` NONE with ``cudagraph_mode`` FULL_DECODE_ONLY: full graphs need no compilation."""
    from vllm.config import CompilationMode, CUDAGraphMode

    assert not value
    return Changes(config={"mode": CompilationMode.NONE, "cudagraph_mode": CUDAGraphMode.FULL_DECODE_ONLY})


def eager_backend(value: bool) -> Changes:
    """``VllmBackend`` with ``EagerAdaptor`` in Inductor's place; vLLM's own kernels are then switched on."""
    assert not value
    return Changes(config={"backend": "eager"})


def static_sizes(value: list[int]) -> Changes:
    """``compiler_interface.set_inductor_config`` tunes single sizes by these variables. ``max_autotune`` times Inductor's
    matrix products against the libraries' (14 s for the four of an 8B model); coordinate descent takes minutes."""
    tuning = {
        "VLLM_ENABLE_INDUCTOR_MAX_AUTOTUNE": "1",
        "VLLM_ENABLE_INDUCTOR_COORDINATE_DESCENT_TUNING": "0",
    }
    return Changes(config={"compile_sizes": list(value)}, environment=tuning)


def aot(value: bool) -> Changes:
    return Changes(environment={"VLLM_USE_AOT_COMPILE": str(int(value))})


def whole_artifact(value: bool) -> Changes:
    return Changes(environment={"VLLM_USE_MEGA_AOT_ARTIFACT": str(int(value))})


def optimization(value: int) -> Changes:
    return Changes(arguments={"optimization_level": value})


def kernel_autotune(value: bool) -> Changes:
    """The argument and the field of ``kernel_config`` exclude each other."""
    return Changes(arguments={"enable_flashinfer_autotune": value}, unless=("kernel_config",))


def attention_splits(value: int) -> Changes | str:
    """A bound for what FlashAttention's scheduler may choose; above one, ``flash_fwd_combine`` is part of every graph."""
    from vllm.config import AttentionConfig
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return NO_CUDA
    return Changes(arguments={"attention_config": AttentionConfig(flash_attn_max_num_splits_for_cuda_graph=value)})


def launch_overlap(value: bool) -> Changes | str:
    import torch._inductor.config as inductor
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return NO_CUDA
    if not hasattr(inductor.triton, "enable_pdl"):
        return "this torch's Inductor launches no kernel early"
    return Changes(inductor={"triton.enable_pdl": value})


def memory_plan(value: bool) -> Changes:
    return Changes(environment={"VLLM_ENABLE_STARTUP_PLAN": str(int(value))})


PLAIN_SAMPLING = "plain sampling"
# Fields of ``SamplingParams.for_sampler_warmup()`` and the values at which the sampler passes over them.
_FEATURES: dict[str, tuple[Any, ...]] = {
    "top_p": (1.0,), "top_k": (0, -1), "min_p": (0.0,), "frequency_penalty": (0.0,), "presence_penalty": (0.0,),
    "repetition_penalty": (1.0,), "min_tokens": (0,), "logit_bias": (None,), "_bad_words_token_ids": (None,),
    "prompt_logprobs": (None,),
}  # fmt: skip
# Fields of a request that come to the same kernels.
_SAME = {"_bad_words_token_ids": ("bad_words",), "logit_bias": ("allowed_token_ids",)}


def plain_warm_up(value: str) -> Changes:
    """A request that nobody set a feature of launches none of its kernels (``Sampler.apply_sampling_params``). Kernels that
    are compiled later are an error under ``jit_monitor_mode="error"``, and a draft model samples inside of its graphs."""
    from vllm import SamplingParams

    for name in ("for_sampler_warmup", "temperature", "logprobs", *_FEATURES):
        if not hasattr(SamplingParams, name):
            raise ImportError(f"SamplingParams has no {name}")
    hook = Hook(
        "sampler's warm-up",
        "every feature",
        "what the rollouts ask for",
        "this engine warmed up no sampler (Model Runner V1, or its warm-up is off)",
    )
    return Changes(unless=("jit_monitor_mode", "speculative_config"), hooks={PLAIN_SAMPLING: hook})


def _warm_up(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``SamplingParams.for_sampler_warmup()`` -> what a rollout of the pair asks for.

    A feature that rollouts use keeps the values that it is warmed up with; which ones they are compiles nothing else. The
    temperature does (at 1 the logits stay as they are), and so does the number of log-probs.
    """
    from rlpatch import phases

    made = wrapped(*args, **kwargs)
    pair = phases.building()
    if pair is None or pair.compilation is None or not pair.compilation.asks(PLAIN_SAMPLING):
        return made
    asked = pair.sampling
    for name, off in _FEATURES.items():
        wanted = [asked.get(key) for key in (name, *_SAME.get(name, ()))]
        if all(value is None or value in off for value in wanted):
            setattr(made, name, off[0])
    made.logprobs = asked.get("logprobs") or 0  # the sampled token's
    if asked.get("temperature") is not None:
        made.temperature = asked["temperature"]
    return made


def _inspect(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    from rlpatch import phases

    pair = phases.building()
    if pair is None or pair.compilation is None or not pair.compilation.inspects_here:
        return wrapped(*args, **kwargs)
    function = args[0] if args else kwargs["fn"]
    return function()


def patches(context: Context) -> list[Patch]:
    """``_LazyRegisteredModel.inspect_model_cls`` imports the model in a process of its own, so that CUDA stays untouched
    here. Beside a trainer CUDA is in use, and the engine imports the same class here next. vLLM keeps what it found under
    ``VLLM_CACHE_ROOT/modelinfos`` since 0.11; before, every start pays for it.
    """
    return [Patch("vllm.model_executor.models.registry", "_run_in_subprocess", _inspect)]


def patches_of_a_sampler(context: Context) -> list[Patch]:
    """And the sampler's warm-up."""
    return [*patches(context), Patch("vllm.sampling_params", "SamplingParams.for_sampler_warmup", _warm_up)]


Terms = Mapping[str, Callable[[Any], Changes | str]]

# Values for which a term's names are looked up; any will do.
_SAMPLES: dict[str, Any] = {"capture sizes": [1], "static sizes": [1], "optimization": 1, "attention splits": 1}

NO_LORA_GRAPHS = "this vLLM captures one set of CUDA graphs, with or without adapters"
NO_AUTOTUNE = "this vLLM has no switch for it"
NO_COMBO = "this vLLM uses no combo kernels"
NO_AOT = "this vLLM does not cache what Dynamo traced"
NO_PLAN = "this vLLM remembers no memory plan"
NO_WARM_UP = "this vLLM warms up no sampler with every feature"
NO_CUDA = "the engine does not run on CUDA"
NO_SPLITS = "this vLLM bounds no splits of attention, or it was not tried there"
NO_OVERLAP = "the torch of this vLLM has no such option, or it was not tried there"
NO_LEVELS = "this vLLM has no optimization levels that leave the rest alone"


def probe(terms: Terms) -> Callable[[], str | None]:
    """A probe that looks for every name that `terms` come down to."""

    def missing() -> str | None:
        found = surface()
        fields = {field.name for field in dataclasses.fields(found.config)}  # type: ignore[arg-type]
        for term, translate in terms.items():
            try:
                change = translate(_SAMPLES.get(term, False))
            except ImportError as error:
                return f"{term}: {error}"
            if isinstance(change, str):
                continue
            for names, known in (
                (change.config, fields), (change.arguments, found.arguments), (change.environment, found.variables),
            ):  # fmt: skip
                for name in names:
                    if name not in known:
                        return f"{term}: vLLM has no {name}"
        return None

    return missing


def dialect(terms: Terms, **lacks: str) -> Dialect:
    """`lacks`: term, with underscores for spaces -> why these releases have nothing of the kind."""
    return Dialect(surface, terms, {term.replace("_", " "): why for term, why in lacks.items()})


def relies(
    *, fields: tuple[str, ...] = (), arguments: tuple[str, ...] = (), variables: tuple[str, ...] = (),
    others: tuple[Relies, ...] = (),
) -> tuple[Relies, ...]:  # fmt: skip
    """Declarations for an era's fields, engine arguments and variables."""
    found = [Relies("vllm.config:CompilationConfig", parameters=("inductor_compile_config", *fields))]
    if arguments:
        found.append(Relies("vllm.engine.arg_utils:EngineArgs", parameters=arguments))
    found += [Relies(f"vllm.envs:{variable}") for variable in variables]
    found += [Relies("vllm.envs:environment_variables"), Relies("vllm.config:VllmConfig.compilation_config")]
    return (*found, PINNED, INSTANCE, INSPECTION, *others)


AUTOTUNE_VARIABLES = ("VLLM_ENABLE_INDUCTOR_MAX_AUTOTUNE", "VLLM_ENABLE_INDUCTOR_COORDINATE_DESCENT_TUNING")
# Pinned to one: the variable when vLLM is imported
PINNED = Relies("vllm.env_override", contains=("os.environ['TORCHINDUCTOR_COMPILE_THREADS'] = '1'",))
# A dictionary's unknown keys are filtered out, an instance is taken as it is.
INSTANCE = Relies(
    "vllm.entrypoints.llm:LLM.__init__",
    contains=("compilation_config_instance = compilation_config",),
    otherwise=(
        Relies("vllm.entrypoints.llm:LLM.__init__", contains=("_make_config(compilation_config, CompilationConfig)",)),
    ),
)
# Read once where the warm-up's requests are made; the sampler's kernels are launched by what the requests ask for.
SAMPLER = (
    Relies("vllm.sampling_params:SamplingParams.for_sampler_warmup"),
    Relies("vllm.sampling_params:SamplingParams", parameters=("temperature", "logprobs", *_FEATURES)),
    Relies(
        "vllm.v1.worker.gpu.warmup:warmup_kernels",
        contains=("SamplingParams.for_sampler_warmup()",),
        otherwise=(
            Relies("vllm.v1.worker.gpu.warmup:_warmup_kernels", contains=("SamplingParams.for_sampler_warmup()",)),
        ),
    ),
    # Outside of any graph: a method of its own, called after the model's.
    Relies("vllm.v1.worker.gpu.model_runner:GPUModelRunner.sample_tokens"),
    Relies(
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner.capture_model", lacks=("self.sampler", "self.sample_tokens")
    ),
)
SPLITS = (Relies("vllm.config:AttentionConfig", parameters=("flash_attn_max_num_splits_for_cuda_graph",)),)
INSPECTION = Relies("vllm.model_executor.models.registry:_run_in_subprocess", positional=("fn",))
