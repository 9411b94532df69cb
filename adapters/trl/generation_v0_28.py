"""TRL's colocated generation as one cycle, while its sleep mode served the base checkpoint (0.28 to 1.9).

``VLLMGeneration`` is built, synced and used as in 1.10 (see generation_v1_10), but under ``enable_sleep_mode`` its
``generate`` wakes the weights and then calls ``collective_rpc("reload_weights")``, which reads the checkpoint from disk,
*after* ``sync_weights`` has pushed the policy: every rollout comes from the base model (trl#5312). In 0.28 ``sync_weights``
also pushes into weights that are still asleep (trl#5142).
Where the weights are shared the flag is off and none of this happens. Where they are not, generation does here what 1.10
does (trl#5313): after a level-2 sleep the policy is pushed again, into weights that are awake, and nothing is reloaded.
Delete when: the oldest supported TRL is 1.10.
"""

from __future__ import annotations

from typing import Any

from rlpatch.adapters.trl import _pairing, _vllm_generation
from rlpatch.patching import Patch
from rlpatch.registry import Adapter, Context
from rlpatch.relies import Relies


def _prepare(pair: Any, generation: Any) -> None:
    generation._llm_weights_sleeping = False

    def discarded() -> None:
        generation._llm_weights_sleeping = True

    pair.on_discarded = discarded


def _sync_weights(wrapped: Any, generation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if _pairing.pair_of(generation) is None or not generation._llm_weights_sleeping:
        return _pairing.sync_weights(wrapped, generation, args, kwargs)
    from trl.generation import vllm_generation

    empty_cache = getattr(vllm_generation, "empty_cache", None)
    if empty_cache is not None:
        empty_cache()  # required to avoid OOM in some cases
    generation.llm.wake_up(tags=["weights"])
    result = _pairing.sync_weights(wrapped, generation, args, kwargs)
    generation._llm_weights_sleeping = False
    return result


def _generate(wrapped: Any, generation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if _pairing.pair_of(generation) is None or not generation.enable_sleep_mode:
        return _vllm_generation.generate(wrapped, generation, args, kwargs)
    if generation._llm_weights_sleeping:
        generation.sync_weights()
    generation.llm.wake_up(tags=["kv_cache"])
    generation.enable_sleep_mode = False  # else it would reload the checkpoint now
    try:
        result = wrapped(*args, **kwargs)
    finally:
        generation.enable_sleep_mode = True
    generation.llm.sleep(level=2)
    return result


def _patches(context: Context) -> list[Patch]:
    return _vllm_generation.patches(context, prepare=_prepare, sync_weights=_sync_weights, generate=_generate)


def _probe() -> str | None:
    if missing := _vllm_generation.missing():
        return missing
    return "its sleep mode pushes the policy again after each sleep" if _vllm_generation.repushes() else None


ADAPTER = Adapter(
    capability="generation",
    library="trl",
    versions=">=0.28,<1.10",
    module=_vllm_generation.MODULE,
    probe=_probe,
    patches=_patches,
    relies_on=(
        Relies(
            f"{_vllm_generation.MODULE}:VLLMGeneration.generate",
            contains=(
                "self.llm.wake_up(tags=['kv_cache'])",
                "self.llm.collective_rpc('reload_weights')",
                "self.llm.sleep(level=2)",
            ),
        ),
        Relies(f"{_vllm_generation.MODULE}:VLLMGeneration.sync_weights", contains=("self.llm.reset_prefix_cache()",)),
        *_vllm_generation.RELIES,
    ),
)
