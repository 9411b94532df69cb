"""What TRL's log-prob function was called with, in the three ways in which releases declare and call it."""

from __future__ import annotations

from typing import Any

import pytest

from rlpatch.adapters.trl._logps import parted


def named(model: Any, input_ids: Any, attention_mask: Any, logits_to_keep: Any, batch_size: Any = None,
          compute_entropy: bool = False) -> None:  # fmt: skip
    """As most releases have it."""


def handed_on(model: Any, *args: Any, batch_size: Any = None, compute_aux_loss: bool = False, **kwargs: Any) -> None:
    """As 1.14 has it."""


@pytest.mark.parametrize(
    ("function", "args", "kwargs", "others"),
    [
        (named, "mikl", {"compute_entropy": True}, {"compute_entropy": True}),
        (named, "miklb", {"compute_entropy": True}, {"batch_size": "b", "compute_entropy": True}),  # 1.8
        (handed_on, "mikl", {"batch_size": 2, "pixel_values": None}, {"batch_size": 2, "pixel_values": None}),
        (handed_on, "mi", {"logits_to_keep": "l", "attention_mask": "k"}, {}),
        (named, "", {"model": "m", "input_ids": "i", "logits_to_keep": "l", "attention_mask": "k"}, {}),
    ],
)
def test_parted(function: Any, args: str, kwargs: dict[str, Any], others: dict[str, Any]) -> None:
    assert parted(function, tuple(args), kwargs) == (list("mikl"), others)
