"""Gradient checkpointing only where memory asks for it.

TRL turns ``gradient_checkpointing`` on by default (0.22.2 and later), and every backward pass of GRPO and RLOO computes
every layer once more, whether the device is full or two thirds of it lie idle: a forward pass per micro-batch. How long
completions become shows with each rollout. So the memory plan of the trainer's engine is made for both ways, and each pass
goes by its own size: where the plan has room for all activations of so many rows of so many tokens, with the KV cache
released and a twentieth of the device to spare, no layer is checkpointed in it. The numbers are the same bit for bit.

Only where a rollout has several backward passes and nothing waits for them (`one_forward` left alone: several iterations,
RLOO, DDP, dropout): what activations take comes from the device once per rollout and goes back, with torch's cache, before
the next, which costs about as much as one pass gains. The training of a step, eight passes of 8 × 320 tokens of an 8B model
with a LoRA, takes 3.82 s instead of 5.49 on an H200, and 34.6 GiB at most (docs/steps.md).

The flag ``gradient_checkpointing`` of the model's modules is what transformers' layers look at in their forward pass (a
backward pass goes by what was saved), so it is put out for one forward pass and put back, as TRL does with
``gradient_checkpointing_disable`` around scoring, without the walks and the functions made anew. Where memory does not
suffice all the same in a forward pass, it is made again with checkpointing, and so are all to come.

Left alone: a config that was given ``gradient_checkpointing``, images (their tokens are not planned), and whatever has no
memory plan, no standby or weights of its own.
Delete when: TRL decides by memory.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from rlpatch.adapters.trl._logps import WAITING, has_images, parted, relied_on
from rlpatch.patching import Patch
from rlpatch.registry import Adapter, Context

logger = logging.getLogger("rlpatch")

_CLASSES = (("trl.trainer.grpo_trainer", "GRPOTrainer"), ("trl.trainer.rloo_trainer", "RLOOTrainer"))
_LOGPS = "_get_per_token_logps_and_entropies"
_FULL = "_rlpatch_no_room_to_save"  # memory did not suffice once


def saves(trainer: Any, ids: Any) -> bool:
    """Whether a pass of the trainer over `ids` (rows × tokens) saves all its activations; else it checkpoints as the
    trainer is configured."""
    from rlpatch import phases

    state, arguments = vars(trainer), trainer.args
    if state.get(_FULL) or state.get(WAITING) is not None:
        return False
    if arguments.steps_per_generation * trainer.num_iterations < 2:
        return False
    return any(
        pair.memory is not None and pair.standby is not None and pair.standby.released and pair.memory.saves(*ids.shape)
        for pair in phases.of_parameters(trainer.model)
    )


@contextlib.contextmanager
def _saving(model: Any) -> Iterator[None]:
    """No layer of `model` is checkpointed."""
    flag = "gradient_checkpointing"
    checkpointed = [module for module in model.modules() if vars(module).get(flag)]
    try:
        for module in checkpointed:
            setattr(module, flag, False)
        yield
    finally:
        for module in checkpointed:
            setattr(module, flag, True)


def _logps(wrapped: Any, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    import torch

    if not torch.is_grad_enabled():
        return wrapped(*args, **kwargs)
    (_model, ids, *_), others = parted(wrapped, args, kwargs)
    if has_images(others) or not saves(trainer, ids):
        return wrapped(*args, **kwargs)
    try:
        with _saving(trainer.model):
            return wrapped(*args, **kwargs)
    except torch.OutOfMemoryError:
        pass
    # Not before the exception is gone, and with it what the failed pass had made.
    _no_room(trainer, ids)
    return wrapped(*args, **kwargs)


def _no_room(trainer: Any, ids: Any) -> None:
    from rlpatch.standby import make_room

    make_room(ids.device)
    vars(trainer)[_FULL] = True
    logger.warning(
        "rlpatch: out of memory in a forward pass of %d × %d tokens that saved its activations; it is made again with "
        "gradient checkpointing, and so are all to come",
        *ids.shape,
    )


def _train(wrapped: Any, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        return wrapped(*args, **kwargs)
    finally:
        vars(trainer).pop(_FULL, None)


def _patches(context: Context) -> list[Patch]:
    logps = [Patch(module, f"{kind}.{_LOGPS}", _logps) for module, kind in _CLASSES]
    return [*logps, Patch("transformers.trainer", "Trainer.train", _train)]


ADAPTER = Adapter(
    capability="saved_activations",
    library="trl",
    versions=">=0.23,<1.17",
    module=_CLASSES[0][0],
    provides=saves,
    patches=_patches,
    relies_on=tuple(relied_on(f"{module}:{kind}") for module, kind in _CLASSES),
)
