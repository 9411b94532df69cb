"""What every era of TRL does alike: a trainer meets its engine, takes over one that exists, and pushes nothing.

The functions speak of a ``generation``: TRL's ``VLLMGeneration`` (0.28 and later), or a trainer of an earlier era seen as
one (`rlpatch.adapters.trl._own_engine.TrainerView`). Of it they use ``model``, ``accelerator``, ``tensor_parallel_size``,
``gpu_memory_utilization``, ``max_model_length``, ``model_impl``, ``enable_sleep_mode``, ``llm`` and
``_fix_param_name_to_vllm``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rlpatch.registry import Context

if TYPE_CHECKING:
    from rlpatch.phases import Colocation

logger = logging.getLogger("rlpatch")

_ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}


def pair_of(owner: Any) -> Colocation | None:
    """The pair of `owner` (a ``VLLMGeneration`` or a trainer) whose engine exists, if any."""
    pair = vars(owner).get("_rlpatch_pair")
    return pair if pair is not None and pair.engine is not None else None


def refusal(context: Context, generation: Any) -> str | None:
    """Why this trainer cannot share its weights, or None."""
    from rlpatch.errors import UnsupportedError
    from rlpatch.sharing import quantized

    model = generation.model
    split = _split(generation)
    if split is not None:
        return split
    if quantized.has_quantized(model):
        provider = context.providers.get("quantized_weights")
        if provider is None:
            reason = context.reasons.get("quantized_weights", "no adapter serves this vLLM")
            raise UnsupportedError(quantized.without_engine(reason))
        found: str | None = provider.refusal(model)
        return found
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "is_quantized", False):
        return "the trainer's model is quantized"
    return None


def _split(generation: Any) -> str | None:
    """Why trainer and engine do not both hold whole weights, or None."""
    if generation.tensor_parallel_size > 1:
        return f"vllm_tensor_parallel_size={generation.tensor_parallel_size}: each engine holds a part of every weight"
    distributed_type = generation.accelerator.distributed_type
    kind = str(getattr(distributed_type, "value", distributed_type))
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        return f"{kind} keeps the trainer's parameters in buffers of its own"
    return None


def _adapted(model: Any) -> bool:
    from accelerate.utils import is_peft_model

    return bool(is_peft_model(model))


def _renamer(context: Context, generation: Any, adapted: bool) -> Any:
    """The trainer's name of a tensor -> the name that vLLM's loader knows, or None for the adapters' own."""
    fix = generation._fix_param_name_to_vllm
    if not adapted or "lora" not in context.providers:
        return fix
    plain = context.providers["lora"](generation.model).names()
    return lambda name: fix(plain[name]) if name in plain else None


def new_pair(context: Context, generation: Any) -> Colocation:
    """The pair for the engine that TRL is about to build; its construction goes into ``pair.build()``.

    Raises:
        UsageError: the model has no path, or a setting asks for what would lose its adapters.
        UnsupportedError: the model is quantized, and nothing serves that on this vLLM.
    """
    from rlpatch import phases
    from rlpatch.sharing import quantized
    from rlpatch.sharing.share import trainer_slots

    if not getattr(generation.model, "name_or_path", ""):
        raise phases.missing_path()
    names = context.providers.get("checkpoint_names")
    budget = context.providers.get("memory_plan")
    adapted = _adapted(generation.model)
    pair = phases.Colocation(
        context,
        trainer_slots(generation.model, _renamer(context, generation, adapted)),
        refusal=refusal(context, generation),
        renamer=names(generation.model.get_base_model() if adapted else generation.model)
        if names is not None
        else None,
        upstream_sleep=bool(generation.enable_sleep_mode),
        budget=budget(generation) if budget is not None else None,
        sampling=sampling(generation),
    )
    if adapted:
        pair.adapt(generation.model, quantized=quantized.has_quantized(generation.model))

    def settle(pair: Colocation) -> None:
        generation.enable_sleep_mode = pair.upstream_sleep_stays

    # Before TRL looks at the flag again, right after construction, to put the engine to sleep.
    pair.on_joined = settle
    return pair


@contextlib.contextmanager
def alone(generation: Any) -> Iterator[None]:
    """Around the engine's construction by a trainer that is the only process: what tells vLLM so is gone afterwards.

    TRL sets these variables and leaves them, and accelerate takes the next trainer of the process (a notebook's second run)
    for one of several that a launcher started: its model is wrapped in ``DistributedDataParallel``, which holds all
    gradients once more.
    """
    try:
        yield
    finally:
        kind = generation.accelerator.distributed_type
        if str(getattr(kind, "value", kind)) == "NO":  # no launcher had set them
            for name, value in _ALONE.items():
                if os.environ.get(name) == value:
                    del os.environ[name]


def sampling(generation: Any) -> dict[str, Any]:
    """What its rollouts sample with: fields of ``SamplingParams`` in its config, and ``generation_kwargs`` over them."""
    config = getattr(generation, "sampling_config", generation)
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "logprobs")
    found = {name: value for name in names if (value := getattr(config, name, None)) is not None}
    return {**found, **(getattr(config, "generation_kwargs", None) or {})}


def take_over(pair: Colocation, generation: Any) -> None:
    """Generate with the engine that `rlpatch.load` built for this model, where TRL would build one."""
    from rlpatch.errors import UsageError
    from rlpatch.sharing import quantized

    assert pair.engine is not None and pair.owner is not None
    split = _split(generation)
    if split is not None:
        raise UsageError(
            f"the model comes from rlpatch.load and shares its weights with an engine already; {split}. Change that "
            "setting, or load the model with transformers"
        )
    config = pair.engine.llm.llm_engine.model_config
    wanted = generation.max_model_length
    if wanted is not None and wanted > config.max_model_len:
        raise UsageError(
            f"vllm_max_model_length={wanted} is larger than rlpatch.load(max_seq_length={config.max_model_len}), with "
            f"which this model's engine was built; load it with max_seq_length={wanted}, or lower the trainer's setting"
        )
    pair.follow(pair.owner(), quantized=quantized.has_quantized(generation.model), may_part=True)
    _say_what_is_ignored(pair, generation)
    generation.llm = pair.engine.llm
    generation.enable_sleep_mode = False


def _say_what_is_ignored(pair: Colocation, generation: Any) -> None:
    """One line for the settings that the engine was built with otherwise; TRL's defaults are among them."""
    assert pair.engine is not None
    built = pair.engine.llm.llm_engine.vllm_config
    ignored = []
    for setting, wanted, found in (
        ("vllm_gpu_memory_utilization", generation.gpu_memory_utilization, built.cache_config.gpu_memory_utilization),
        ("vllm_max_model_length", generation.max_model_length, built.model_config.max_model_len),
        ("vllm_model_impl", generation.model_impl, str(getattr(built.model_config, "model_impl", "auto"))),
    ):
        if wanted is not None and wanted != found:
            ignored.append(f"{setting}={wanted} (it has {found})")
    if generation.enable_sleep_mode:
        standby = "only its KV cache is released" if pair.standby is not None else "standby is off"
        ignored.append(f"vllm_enable_sleep_mode=True ({standby}: its weights are the trainer's)")
    if ignored:
        logger.info(
            "rlpatch: the trainer uses the engine of rlpatch.load as it is; without effect: %s", ", ".join(ignored)
        )


def sync_weights(wrapped: Any, owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around TRL's push, whatever its name: nothing where the weights are shared."""
    pair = pair_of(owner)
    if pair is None:
        return wrapped(*args, **kwargs)
    start = time.perf_counter()
    try:
        return pair.sync() if pair.pushes else wrapped(*args, **kwargs)
    finally:
        pair.seconds["sync"] += time.perf_counter() - start
