"""``VLLMGeneration`` (0.28 and later) as one cycle; what its eras have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rlpatch.adapters.trl import _pairing
from rlpatch.patching import Patch
from rlpatch.registry import Context
from rlpatch.relies import Relies

MODULE = "trl.generation.vllm_generation"
RELIES = (
    Relies(f"{MODULE}:VLLMGeneration._fix_param_name_to_vllm", positional=("name",)),
    Relies(f"{MODULE}:LLM"),
    *(
        Relies(f"{MODULE}:VLLMGeneration.{name}")
        for name in (
            "model", "accelerator", "mode", "enable_sleep_mode", "tensor_parallel_size", "gpu_memory_utilization",
            "max_model_length", "model_impl", "llm",
            "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "generation_kwargs",
        )
    ),
)  # fmt: skip

Prepare = Callable[[Any, Any], None]


def _init_vllm(
    context: Context,
    prepare: Prepare,
    wrapped: Any,
    generation: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    from rlpatch import phases

    if generation.mode != "colocate":
        return wrapped(*args, **kwargs)
    loaded = phases.of_trainer(generation.model)
    if loaded is not None:
        _pairing.take_over(loaded, generation)
        generation._llm_weights_sleeping = False
        generation._rlpatch_pair = loaded
        generation.accelerator.wait_for_everyone()
        return None
    pair = generation._rlpatch_pair = _pairing.new_pair(context, generation)
    prepare(pair, generation)
    try:
        with pair.build(), _pairing.alone(generation):
            return wrapped(*args, **kwargs)
    except BaseException:
        del generation._rlpatch_pair
        raise


def generate(wrapped: Any, generation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around ``VLLMGeneration.generate``: policy and KV cache are in place inside."""
    pair = _pairing.pair_of(generation)
    if pair is None:
        return wrapped(*args, **kwargs)
    with pair.rollout():
        return wrapped(*args, **kwargs)


def patches(
    context: Context,
    *,
    prepare: Prepare = lambda pair, generation: None,
    sync_weights: Any = _pairing.sync_weights,
    generate: Any = generate,
) -> list[Patch]:
    """The patches of one era.

    Args:
        prepare: Called with a new pair and its ``VLLMGeneration`` before the engine is built.
        sync_weights: Wrapper around ``VLLMGeneration.sync_weights``.
        generate: Wrapper around ``VLLMGeneration.generate``.
    """

    def init_vllm(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _init_vllm(context, prepare, wrapped, instance, args, kwargs)

    return [
        Patch(MODULE, "VLLMGeneration._init_vllm", init_vllm),
        Patch(MODULE, "VLLMGeneration.sync_weights", sync_weights),
        Patch(MODULE, "VLLMGeneration.generate", generate),
    ]


def missing() -> str | None:
    """What `VLLMGeneration` of this release lacks, for probes; None: nothing."""
    from trl.generation.vllm_generation import VLLMGeneration

    wanted = ("_init_vllm", "sync_weights", "generate", "_fix_param_name_to_vllm")
    absent = [name for name in wanted if not hasattr(VLLMGeneration, name)]
    return f"VLLMGeneration has no {', '.join(absent)}" if absent else None


def repushes() -> bool:
    """Whether it pushes the policy again after a level-2 sleep (trl#5313)."""
    import inspect

    from trl.generation.vllm_generation import VLLMGeneration

    return "_llm_weights_sleeping" in inspect.getsource(VLLMGeneration._init_vllm)
