"""Optimizer state that waits in host memory between steps, for trainers that share their device with an engine.

``Trainer.create_optimizer`` builds the optimizer once, before accelerate wraps it and before a checkpoint's state is read;
from then on the optimizer's own hooks do the rest (`rlpatch.parking`). Left alone: DeepSpeed and FSDP, which offload
themselves, paged optimizers, and trainers without an engine.
Delete when: transformers offloads optimizer state outside of DeepSpeed and FSDP.
"""

from __future__ import annotations

import logging
from typing import Any

from rlpatch.patching import Patch
from rlpatch.registry import Adapter, Context
from rlpatch.relies import Relies

logger = logging.getLogger("rlpatch")


def _create_optimizer(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    from rlpatch.parking import ParkedState

    before = instance.optimizer
    created = wrapped(*args, **kwargs)
    optimizer = instance.optimizer
    if before is None and optimizer is not None and _asked_for(instance):
        why = _left_alone(instance, optimizer)
        if why is None:
            ParkedState(optimizer)
        else:
            logger.warning("rlpatch: the optimizer's state is not parked: %s", why)
    return created


def _asked_for(trainer: Any) -> bool:
    """By the settings, or by the memory plan of the trainer's engine."""
    from rlpatch import phases

    return any(
        pair.context.park_optimizer is True or (pair.memory is not None and pair.memory.parked)
        for pair in phases.of_parameters(trainer.model)
    )


def parks(trainer: Any) -> bool:
    """Whether the state of an optimizer that this trainer makes is parked."""
    return not (getattr(trainer, "is_deepspeed_enabled", False) or getattr(trainer, "is_fsdp_enabled", False))


def _left_alone(trainer: Any, optimizer: Any) -> str | None:
    """Why the state of this trainer's optimizer stays where it is, or None."""
    import torch

    if not parks(trainer):
        return "DeepSpeed and FSDP have offloading of their own"
    if not isinstance(optimizer, torch.optim.Optimizer):
        return f"{type(optimizer).__name__} is no torch.optim.Optimizer"
    if getattr(optimizer, "is_paged", False):
        return "it is paged already"
    return None


def _patches(context: Context) -> list[Patch]:
    return [Patch("transformers.trainer", "Trainer.create_optimizer", _create_optimizer)]


ADAPTER = Adapter(
    capability="park_optimizer",
    library="transformers",
    versions=">=4.51,<5.25",
    module="transformers.trainer",
    provides=parks,
    patches=_patches,
    relies_on=(
        Relies(
            "transformers.trainer:Trainer.create_optimizer",
            contains=("optimizer_cls(optimizer_grouped_parameters, **optimizer_kwargs)",),
        ),
        Relies("transformers.trainer:Trainer.is_deepspeed_enabled"),
        Relies("transformers.trainer:Trainer.is_fsdp_enabled"),
    ),
)
