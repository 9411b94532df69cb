"""TRL's colocated generation as one cycle (1.10 and later).

``VLLMGeneration`` (generation/vllm_generation.py) serves GRPO, RLOO and others: ``_init_vllm`` builds the engine and,
under ``enable_sleep_mode``, calls ``llm.sleep(level=2)``; ``sync_weights`` pushes every parameter through
``load_weights``; ``generate`` re-pushes after a level-2 sleep (``_llm_weights_sleeping``, trl#5142), wakes, generates
and sleeps again. With shared weights the push becomes nothing, and TRL's sleep mode becomes KV standby: the flag
``enable_sleep_mode`` is off for as long as the pair shares.
Delete when: TRL has a hook around engine construction and generation.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from rlpatch.patching import Patch
from rlpatch.registry import Adapter, Context

if TYPE_CHECKING:
    from rlpatch.phases import Colocation

_MODULE = "trl.generation.vllm_generation"


def _pair(generation: Any) -> Colocation | None:
    pair = vars(generation).get("_rlpatch_pair")
    return pair if pair is not None and pair.engine is not None else None


def _refusal(context: Context, generation: Any) -> str | None:
    """Why this trainer cannot share its weights, or None."""
    from rlpatch.errors import UnsupportedError
    from rlpatch.sharing import quantized

    model, accelerator = generation.model, generation.accelerator
    if generation.tensor_parallel_size > 1:
        return f"vllm_tensor_parallel_size={generation.tensor_parallel_size}: each engine holds a part of every weight"
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        return f"{kind} keeps the trainer's parameters in buffers of its own"
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


def _init_vllm(context: Context, wrapped: Any, generation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    from rlpatch import phases
    from rlpatch.sharing import quantized
    from rlpatch.sharing.share import trainer_slots

    if generation.mode != "colocate":
        return wrapped(*args, **kwargs)
    if not getattr(generation.model, "name_or_path", ""):
        raise phases.missing_path()
    names = context.providers.get("checkpoint_names")
    adapted = _adapted(generation.model)
    pair = phases.Colocation(
        context,
        trainer_slots(generation.model, _renamer(context, generation, adapted)),
        refusal=_refusal(context, generation),
        renamer=names(generation.model.get_base_model() if adapted else generation.model)
        if names is not None
        else None,
        upstream_sleep=bool(generation.enable_sleep_mode),
    )

    if adapted:
        pair.adapt(generation.model, quantized=quantized.has_quantized(generation.model))

    def settle(pair: Colocation) -> None:
        generation.enable_sleep_mode = pair.upstream_sleep_stays

    # Before TRL looks at the flag again, right after construction, to put the engine to sleep at level 2.
    pair.on_joined = settle
    generation._rlpatch_pair = pair
    try:
        with pair.build():
            return wrapped(*args, **kwargs)
    except BaseException:
        del generation._rlpatch_pair
        raise


def _sync_weights(wrapped: Any, generation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    pair = _pair(generation)
    if pair is None:
        return wrapped(*args, **kwargs)
    start = time.perf_counter()
    try:
        return pair.sync() if pair.pushes else wrapped(*args, **kwargs)
    finally:
        pair.seconds["sync"] += time.perf_counter() - start


def _generate(wrapped: Any, generation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    pair = _pair(generation)
    if pair is None:
        return wrapped(*args, **kwargs)
    with pair.rollout():
        return wrapped(*args, **kwargs)


def _patches(context: Context) -> list[Patch]:
    def init_vllm(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _init_vllm(context, wrapped, instance, args, kwargs)

    return [
        Patch(_MODULE, "VLLMGeneration._init_vllm", init_vllm),
        Patch(_MODULE, "VLLMGeneration.sync_weights", _sync_weights),
        Patch(_MODULE, "VLLMGeneration.generate", _generate),
    ]


def _probe() -> str | None:
    import inspect

    from trl.generation.vllm_generation import VLLMGeneration

    missing = [
        n
        for n in ("_init_vllm", "sync_weights", "generate", "_fix_param_name_to_vllm")
        if not hasattr(VLLMGeneration, n)
    ]
    if missing:
        return f"VLLMGeneration has no {', '.join(missing)}"
    if "_llm_weights_sleeping" not in inspect.getsource(VLLMGeneration._init_vllm):
        return "its sleep mode is of the era that reloads the base checkpoint"
    return None


ADAPTER = Adapter(
    capability="generation",
    library="trl",
    versions=">=1.10,<1.17",
    module=_MODULE,
    probe=_probe,
    patches=_patches,
)
