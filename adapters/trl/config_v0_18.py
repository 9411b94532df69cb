"""Better defaults and batches that divide, in every TRL config with ``num_generations`` (0.18 and later).

A config is a dataclass over ``transformers.TrainingArguments``: its ``__init__`` assigns the fields and calls
``__post_init__``, where TRL derives ``steps_per_generation`` and ``generation_batch_size`` from the batch and refuses what
does not divide. What the config was made with is noted (`_configs`); the fields are changed at the entry of TRL's
``__post_init__``, before transformers hands them to DeepSpeed or accelerate. Whether a LoRA is trained is only known when
``transformers.Trainer.__init__`` gets the model, still before there is an optimizer.
Delete when: never for the defaults; the arithmetic when TRL rounds batches to whole groups itself.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import os
import sys
import threading
import weakref
from typing import Any

from rlpatch.adapters.trl import _source
from rlpatch.adapters.trl._configs import CLASSES, RELIES, UPSTREAM, watching
from rlpatch.config import given, listing
from rlpatch.config.batching import GENERATION, STEPS
from rlpatch.config.defaults import (
    GENERATIONS,
    LEARNING_RATE,
    LORA_LEARNING_RATE,
    Change,
    Default,
    fix,
    table,
)
from rlpatch.patching import Patch
from rlpatch.registry import Adapter, Context
from rlpatch.relies import Relies

# RLOOConfig 0.22–0.24 moves these old names over the new ones in its __post_init__
RENAMED = {"rloo_k": GENERATIONS, "num_mini_batches": STEPS}
_inside = threading.local()
# id of a config -> itself (weakly), and the learning rate that was left at its default
_rates: dict[int, tuple[weakref.ref[Any], float]] = {}


def _world_size(config: Any) -> int:
    """Processes that will train together, as accelerate will find them once the config asks it to."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        return int(torch.distributed.get_world_size())
    from accelerate.utils import get_int_from_env

    on_cpu = bool(getattr(config, "use_cpu", False))
    if not on_cpu and get_int_from_env(["LOCAL_RANK"], -1) < 0:
        return 1
    names = ["PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"] if on_cpu else []
    return max(1, int(get_int_from_env([*names, "WORLD_SIZE"], 1)))


def _evaluates(config: Any) -> bool:
    strategy = getattr(config, "eval_strategy", "no")
    return str(getattr(strategy, "value", strategy)) != "no"


@functools.cache
def _heeds_eval_generations(kind: Any) -> bool:
    """0.26 has the field but checks the evaluation batch against ``num_generations``; look at what the release runs."""
    bodies = [vars(c)["__post_init__"] for c in kind.__mro__ if "__post_init__" in vars(c)]
    return any("num_generations_eval" in inspect.getsource(body) for body in bodies)


@functools.cache
def _bitsandbytes() -> bool:
    try:
        importlib.import_module("bitsandbytes")
    except Exception:  # a build for another CUDA fails in many ways
        return False
    return True


def _eight_bit(config: Any) -> bool:
    """Whether bitsandbytes' optimizers run here: they are kernels of a device."""
    import torch

    return not getattr(config, "use_cpu", False) and torch.cuda.is_available() and _bitsandbytes()


def _defaults(config: Any) -> tuple[Default, ...]:
    found = table(eight_bit=_eight_bit(config))
    sharded = getattr(config, "deepspeed", None) or getattr(config, "fsdp", None)
    for launcher in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
        sharded = sharded or os.environ.get(launcher, "false").lower() == "true"
    # Sharded optimizers have settings of their own
    return tuple(entry for entry in found if entry.field != "optim") if sharded else found


def _fix(context: Context, config: Any) -> listing.Listing | None:
    """Change the fields of a config whose ``__post_init__`` is about to run; what was changed, for the listing."""
    values = {
        entry.name: getattr(config, entry.name) for entry in dataclasses.fields(config) if hasattr(config, entry.name)
    }
    renamed = {new: old for old, new in RENAMED.items() if values.get(old) is not None}
    values |= {new: values[old] for new, old in renamed.items()}
    free = given.left_alone(config, UPSTREAM) - renamed.keys()
    fixed = fix(
        values,
        free,
        given.given(config) or (),
        defaults=_defaults(config),
        names=context.defaults,
        world_size=_world_size(config),
        evaluates=_evaluates(config),
        eval_adjustable=_heeds_eval_generations(config.__class__),
    )
    for change in fixed.changes:
        setattr(config, renamed.get(change.field, change.field), change.new)
    if LEARNING_RATE in context.defaults and LEARNING_RATE in free:
        _remember_rate(config)
    if not fixed.changes:
        return None
    return listing.Listing(type(config).__name__, fixed.changes, listing.batch_line(fixed.before, fixed.after))


def _remember_rate(config: Any) -> None:
    """Outside the config: what is written into its ``__dict__`` would end up in checkpoints."""
    key = id(config)
    _rates[key] = (weakref.ref(config, lambda _: _rates.pop(key, None)), config.learning_rate)


def _explain(config: Any, error: ValueError) -> ValueError:
    """TRL's refusal, or a clearer one for groups of fewer than two."""
    from rlpatch.errors import UsageError

    count = getattr(config, GENERATIONS, None)
    if not isinstance(count, int) or count >= 2 or isinstance(error, UsageError):
        return error
    return UsageError(
        f"num_generations={count}: the advantage of a completion is its reward measured against the other completions of "
        "the same prompt, (reward − mean) / standard deviation. One sample equals its mean, and the standard deviation of "
        "one sample is undefined (it divides by n − 1 = 0), so there would be no advantage and nothing to learn. Set "
        f"num_generations to 2 or more (8 is a good start). TRL says: {error}"
    )


def _post_init(context: Context, wrapped: Any, config: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if getattr(_inside, "config", None) is config:  # a subclass of TRL's called its parent
        return wrapped(*args, **kwargs)
    before, _inside.config = getattr(_inside, "config", None), config
    try:
        listed = _fix(context, config)
        try:
            result = wrapped(*args, **kwargs)
        except ValueError as error:
            clearer = _explain(config, error)
            if clearer is error:
                raise
            raise clearer from error
    finally:
        _inside.config = before
    if listed is not None:
        listing.add(listed)
    return result


def _trains_lora(model: Any) -> bool:
    configs = getattr(model, "peft_config", None)
    kinds = [getattr(c, "peft_type", "") for c in configs.values()] if isinstance(configs, dict) else []
    return any(str(getattr(kind, "value", kind)).endswith("LORA") for kind in kinds)


def _trainer_init(wrapped: Any, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    model = args[0] if args else kwargs.get("model")
    config = args[1] if len(args) > 1 else kwargs.get("args")
    _set_rate(trainer, model, config, kwargs.get("optimizers") or (None,))
    return wrapped(*args, **kwargs)


def _set_rate(trainer: Any, model: Any, config: Any, optimizers: Any) -> None:
    """The learning rate of a config that left it alone, now that it is known what is trained."""
    found, rate = _rates.get(id(config), (None, 0.0))
    if found is None or found() is not config or config is None or optimizers[0] is not None:
        return
    lora = _trains_lora(model)
    if lora and config.learning_rate == rate != LORA_LEARNING_RATE.value:
        config.learning_rate = LORA_LEARNING_RATE.value
        change = Change(LEARNING_RATE, rate, LORA_LEARNING_RATE.value, LORA_LEARNING_RATE.why)
        listing.add(listing.Listing(f"{type(config).__name__} of {type(trainer).__name__}", (change,)))
    elif not lora and config.learning_rate == LORA_LEARNING_RATE.value:
        config.learning_rate = rate  # the same config served a trainer with a LoRA before


def _patches(context: Context) -> list[Patch]:
    def post_init(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _post_init(context, wrapped, instance, args, kwargs)

    return [
        *watching(),
        *(Patch(module, f"{kind}.__post_init__", post_init) for module, kind in CLASSES),
        Patch("transformers.trainer", "Trainer.__init__", _trainer_init),
    ]


def _probe() -> str | None:
    """The fields that the arithmetic reads must be those of the release."""
    source = _source.text("trainer/grpo_config.py")
    missing = [name for name in (GENERATIONS, GENERATION, STEPS) if f"    {name}:" not in source]
    return f"GRPOConfig has no {', '.join(missing)}" if missing else None


ADAPTER = Adapter(
    capability="defaults",
    library="trl",
    versions=">=0.18,<1.17",
    module="trl",
    probe=_probe,
    patches=_patches,
    relies_on=(
        *(Relies(f"trl.trainer.grpo_config:GRPOConfig.{name}") for name in (GENERATIONS, GENERATION, STEPS)),
        Relies("trl.trainer.grpo_config:GRPOConfig.__post_init__"),
        *RELIES,
    ),
)
