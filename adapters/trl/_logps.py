"""What ``_get_per_token_logps_and_entropies`` was called with, in whichever release.

1.8 passes the batch size by position; 1.14 takes all but the model as ``*args`` and ``**kwargs`` and hands them on, the
first three by position.
"""

from __future__ import annotations

import inspect
from typing import Any

from rlpatch.relies import Relies

WAITING = "_rlpatch_scored"  # a trainer's attribute: the graphs of `one_forward` that wait
_SCORED = ("model", "input_ids", "attention_mask", "logits_to_keep")


def parted(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Model, ids, mask and the number of logits to keep, and all other arguments by name."""
    named = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    names = named if tuple(named[:4]) == _SCORED else _SCORED
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return [given.pop(name) for name in _SCORED], given


def has_images(others: dict[str, Any]) -> bool:
    """Whether any of the other arguments is an image or speaks of one."""
    import torch

    return any(isinstance(value, (torch.Tensor, list, tuple)) for value in others.values())


def relied_on(trainer: str) -> Relies:
    """That the arguments which `parted` takes by position have the names and the order it goes by."""
    handed_on = Relies(f"{trainer}._full_logits_logps", positional=_SCORED)
    return Relies(f"{trainer}._get_per_token_logps_and_entropies", positional=_SCORED, otherwise=(handed_on,))
