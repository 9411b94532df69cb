"""GOLD's colocated generation as one cycle, while the trainer builds the engine itself (0.25 to 0.29).

``GOLDTrainer.__init__`` calls ``LLM(…)`` and keeps it as ``vllm_engine``; a callback calls ``_move_model_to_vllm`` after
every ``vllm_sync_frequency`` steps. With shared weights the engine is up to date after each step, whatever that says.
(In 0.25 no generation comes about, with rlpatch as without: GOLD reads ``generation_config.max_completion_length``, which
it never set.)
Under ``vllm_enable_sleep_mode`` the weights are discarded as soon as the engine exists and after every generation, and
that callback alone brings them back: ``_wake_vllm_if_needed`` wakes the KV cache only, so that the first generation, and
with gradient accumulation most others, never end (a vLLM that counts as asleep schedules nothing) or come from memory
that holds nothing. Where the weights are not shared, a generation that finds them discarded pushes them first.
Delete when: the oldest supported TRL is 1.0.
"""

from __future__ import annotations

from typing import Any

from rlpatch.adapters.trl import _own_engine, _pairing
from rlpatch.patching import Patch
from rlpatch.registry import Adapter, Context
from rlpatch.relies import Relies

_MODULE = "trl.experimental.gold.gold_trainer"


def _push(wrapped: Any, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    result = _pairing.sync_weights(wrapped, trainer, args, kwargs)
    trainer._last_loaded_step = trainer.state.global_step
    return result


def _wake(wrapped: Any, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # GOLD keeps no _last_loaded_step: it is -1 where `_own_engine` noted that the weights are gone, and then only
    if _pairing.pair_of(trainer) is not None and getattr(trainer, "_last_loaded_step", 0) == -1:
        trainer._move_model_to_vllm()
    return wrapped(*args, **kwargs)


def _patches(context: Context) -> list[Patch]:
    return [
        *_own_engine.patches(context, _MODULE, "GOLDTrainer", push=_push),
        Patch(_MODULE, "GOLDTrainer._wake_vllm_if_needed", _wake),
    ]


ADAPTER = Adapter(
    capability="gold",
    library="trl",
    versions=">=0.25,<1.0",
    module=_MODULE,
    probe=lambda: _own_engine.missing(_MODULE, "GOLDTrainer"),
    patches=_patches,
    relies_on=(
        Relies(f"{_MODULE}:LLM"),
        Relies(f"{_MODULE}:GOLDTrainer._move_model_to_vllm"),
        Relies(
            f"{_MODULE}:GOLDTrainer._wake_vllm_if_needed", contains=("self.vllm_engine.wake_up(tags=['kv_cache'])",)
        ),
    ),
)
