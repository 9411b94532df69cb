"""Do the rollouts still come from the policy that is trained? Told from log-probs that exist anyway.

vLLM returns the log-prob of each sampled token; the trainer computes its own for the same tokens. Under one policy they
differ by rounding alone. When the engine goes on with an older policy, the difference grows with every optimizer step,
and nothing else shows it: rewards stall, no error comes (trl#5312).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

FIRST = 3
"""The level is the smallest of so many first differences. The very first is taken before any optimizer step, when even an
engine that will never be updated has the trainer's policy; the smallest, because later ones may be stale already."""

FACTOR = 4.0
"""Rounding moves a mean over a batch of tokens by tens of percent from step to step, and the smallest of three lies below
the mean; no healthy run of the golden suite exceeds three times its level."""

FLOOR = 1e-3
"""nats. In float32 the level is 1e-7 to 1e-6, where a factor means nothing; no policy worth a word is this close."""

CEILING = 1.0
"""nats. Tokens e times as likely for one as for the other, on average: no precision does that, whatever the level."""

IN_A_ROW = 3
"""A batch of odd samples or a flip of expert routing passes; a policy that is not updated stays behind."""


@dataclass
class Agreement:
    """Mean absolute differences between the trainer's and the rollouts' log-probs, one per batch of rollouts, in nats.

    Attributes:
        count: Differences seen.
        level: The smallest of the first `FIRST`, or None before the first.
        last: The latest.
        parted: Whether they have parted for good: above the limit `IN_A_ROW` times in a row, at any time.
    """

    count: int = 0
    level: float | None = None
    last: float | None = None
    parted: bool = False
    _above: int = field(default=0, repr=False)

    @property
    def limit(self) -> float:
        """Differences above this do not come from rounding."""
        return min(CEILING, max(FLOOR, FACTOR * (self.level if self.level is not None else math.inf)))

    def add(self, difference: float) -> bool:
        """Take in one difference; returns True once: when it shows that rollouts and trainer have parted.

        Differences that are not finite (no token was scored) are left out.
        """
        if not math.isfinite(difference):
            return False
        self.count += 1
        self.last = difference
        if self.count <= FIRST:
            self.level = difference if self.level is None else min(self.level, difference)
        self._above = self._above + 1 if difference > self.limit else 0
        if self.parted or self._above < IN_A_ROW:
            return False
        self.parted = True
        return True

    def describe(self) -> dict[str, Any] | None:
        """Plain data for ``status()``; None before the first difference."""
        if self.count == 0:
            return None
        return {"level": self.level, "last": self.last, "limit": self.limit, "seen": self.count, "parted": self.parted}
