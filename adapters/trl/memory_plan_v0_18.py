"""What the memory plan needs to know of a trainer that is about to build its engine (0.18 and later).

The engine is built in ``GRPOTrainer.__init__`` and ``RLOOTrainer.__init__``, from 0.28 through a ``VLLMGeneration`` that
holds the model but neither the trainer nor its config. So trainers are noted when ``transformers.Trainer.__init__`` gets
their model, which is always before; the reference model and the reward models are attributes by then, the optimizer is
not there yet. Whether ``vllm_gpu_memory_utilization`` and ``gradient_checkpointing`` were left alone is noted in the
config's ``__post_init__``.
Other trainers with an engine (Online DPO, GOLD, distillation) hold a teacher or a judge that the plan does not count.
Delete when: never; the plan is rlpatch's.
"""

from __future__ import annotations

import weakref
from typing import Any

from rlpatch.adapters.trl import _source
from rlpatch.adapters.trl._configs import CLASSES, RELIES, UPSTREAM, watching
from rlpatch.config import given
from rlpatch.patching import Patch
from rlpatch.registry import Adapter, Context
from rlpatch.relies import Relies

SETTING, CHECKPOINTING = "vllm_gpu_memory_utilization", "gradient_checkpointing"
_PLANNED = ("GRPOConfig", "RLOOConfig")

# id of a config -> itself (weakly), and the defaults at which settings were left. Outside the config: what is written into
# its ``__dict__`` would end up in checkpoints.
_alone: dict[int, tuple[weakref.ref[Any], dict[str, Any]]] = {}
_trainers: weakref.WeakSet[Any] = weakref.WeakSet()


def _post_init(wrapped: Any, config: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    left = {SETTING, CHECKPOINTING} & given.left_alone(config, UPSTREAM)
    if left:
        key = id(config)
        defaults = {name: getattr(config, name) for name in left}
        _alone[key] = (weakref.ref(config, lambda _: _alone.pop(key, None)), defaults)
    return wrapped(*args, **kwargs)


def _trainer_init(wrapped: Any, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    _trainers.add(trainer)
    return wrapped(*args, **kwargs)


def left_alone(config: Any, setting: str = SETTING) -> bool:
    """Whether nobody set `setting` of `config` (`SETTING` or `CHECKPOINTING`), in its construction or since."""
    noted, defaults = _alone.get(id(config), (None, {}))
    return (
        noted is not None
        and noted() is config
        and setting in defaults
        and getattr(config, setting) == defaults[setting]
    )


def budget(generation: Any) -> Any:
    """What is known of the trainer of `generation` (see `_pairing`): a `rlpatch.memory.budget.Budget`, or why there is
    none, in words."""
    from rlpatch.memory.budget import Budget
    from rlpatch.precision import model as models

    trainer = next((t for t in _trainers if getattr(t, "model", None) is generation.model), None)
    if trainer is None:
        return "the trainer of this engine is not known"
    kinds = [kind for kind in type(trainer.args).__mro__ if kind.__module__.partition(".")[0] == "trl"]
    if not any(kind.__name__ in _PLANNED for kind in kinds):
        return f"{type(trainer).__name__} may hold models that the plan does not count"
    prepared = models.of(generation.model)
    return Budget(
        trainer,
        generation.model,
        left_alone(trainer.args),
        masters=prepared is not None and prepared.uses_masters,
        residual="float32" if prepared is not None and prepared.widened else None,
        head=_head(trainer),
        saving=bool(getattr(trainer.args, CHECKPOINTING, False)) and left_alone(trainer.args, CHECKPOINTING),
    )


def _head(trainer: Any) -> str:
    """How this release computes log-probabilities: in tiles (1.15 and later), or from all logits at once."""
    from rlpatch.memory.training import FULL, TILES

    name = "rloo" if any(kind.__name__ == "RLOOConfig" for kind in type(trainer.args).__mro__) else "grpo"
    return TILES if "fused_lm_head=True" in _source.text(f"trainer/{name}_trainer.py") else FULL


def _patches(context: Context) -> list[Patch]:
    return [
        *watching(),
        *(Patch(module, f"{kind}.__post_init__", _post_init) for module, kind in CLASSES),
        Patch("transformers.trainer", "Trainer.__init__", _trainer_init),
    ]


def _probe() -> str | None:
    found = f"    {SETTING}:" in _source.text("trainer/grpo_config.py")
    return None if found else f"GRPOConfig has no {SETTING}"


ADAPTER = Adapter(
    capability="memory_plan",
    library="trl",
    versions=">=0.18,<1.17",
    module="trl",
    probe=_probe,
    provides=budget,
    patches=_patches,
    relies_on=(
        Relies(f"trl.trainer.grpo_config:GRPOConfig.{SETTING}"),
        Relies("trl.trainer.grpo_config:GRPOConfig.__post_init__"),
        *RELIES,
    ),
)
