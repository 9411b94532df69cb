"""A LoRA as the cores see it: weights, and the low-rank products that the active adapters add to them.

Who trains the adapter (PEFT) and which layer classes it has is an adapter's business; see `rlpatch.adapters.peft`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Product:
    """``scale · left @ right``, one active adapter's part of a weight's delta.

    Attributes:
        left: ``[rows, r]``; of an ordinary linear layer this is PEFT's ``lora_B``. Any strides.
        right: ``[r, columns]``; ``lora_A``. Any strides.
        scale: PEFT's scaling (alpha / r, or alpha / sqrt(r) with rsLoRA).
        adapter: The adapter's name.
    """

    left: torch.Tensor
    right: torch.Tensor
    scale: float
    adapter: str = "default"

    @property
    def rank(self) -> int:
        """r."""
        return int(self.left.shape[1])


@dataclass(frozen=True)
class Target:
    """One matrix that adapters change.

    Attributes:
        name: The trainer's name of the weight without PEFT's prefixes, e.g. ``model.layers.0.self_attn.q_proj.weight``;
            experts of a 3-D parameter carry their index, e.g. ``model.layers.0.mlp.experts.down_proj[3]``.
        weight: ``[rows, columns]``, a view of the trainer's parameter (detached); any strides.
        products: What the active adapters add, in their order.
        parameter: Name of the whole parameter (differs from `name` for experts only).
        frozen: Whether the weight itself is not trained.
    """

    name: str
    weight: torch.Tensor
    products: tuple[Product, ...]
    parameter: str = ""
    frozen: bool = True

    def delta(self) -> torch.Tensor:
        """``[rows, columns]``, what the adapters add, in fp32 (fp64 for fp64 weights)."""
        total = torch.zeros(
            self.weight.shape, dtype=torch.promote_types(self.weight.dtype, torch.float32), device=self.weight.device
        )
        with torch.autocast(total.device.type, enabled=False):  # else whoever asks within autocast gets other bits
            for product in self.products:
                total += (product.left.to(total.dtype) @ product.right.to(total.dtype)) * product.scale
        return total


@dataclass(frozen=True)
class Adaptation:
    """What the active adapters of a model amount to.

    Attributes:
        targets: Matrices with a low-rank delta.
        refused: What is more than a low-rank delta and has no target: layer name -> reason.
        unfoldable: What has a target and cannot be folded all the same: name -> reason.
        adapters: Names of the active adapters.
    """

    targets: tuple[Target, ...]
    refused: dict[str, str] = field(default_factory=dict)
    unfoldable: dict[str, str] = field(default_factory=dict)
    adapters: tuple[str, ...] = ()


def in_one_line(reasons: dict[str, str]) -> str:
    """``{name: reason}`` in one line: each reason once, with the first name that it concerns and how many more."""
    by_reason: dict[str, list[str]] = {}
    for name, why in reasons.items():
        by_reason.setdefault(why, []).append(name)
    parts = []
    for why, names in by_reason.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        parts.append(f"{names[0]}{more}: {why}")
    return "; ".join(parts)
