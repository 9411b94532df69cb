"""What was changed in which config: one log listing each, and the same as data for ``status()``."""

from __future__ import annotations

import logging
import os
from collections import deque
from dataclasses import dataclass
from typing import Any

from rlpatch.config.batching import Batching
from rlpatch.config.defaults import Change

logger = logging.getLogger("rlpatch")


@dataclass(frozen=True)
class Listing:
    """The changes of one config.

    Attributes:
        config: The config's class.
        changes: Old, new, why; one per field.
        batch: Effective and generation batch before and after, in words; empty when they did not change.
    """

    config: str
    changes: tuple[Change, ...]
    batch: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"config": self.config, "changes": [change.as_dict() for change in self.changes], "batch": self.batch}

    def __str__(self) -> str:
        wide = max(len(change.field) for change in self.changes)
        moves = [f"{change.old} → {change.new}" for change in self.changes]
        narrow = max(map(len, moves))
        lines = [
            f"  {change.field:{wide}}  {move:{narrow}}  {change.why}"
            for change, move in zip(self.changes, moves, strict=True)
        ]
        return "\n".join(
            [f"{self.config}: {len(lines)} settings changed", *lines, *([f"  {self.batch}"] * bool(self.batch))]
        )


_listings: deque[Listing] = deque(maxlen=16)


def batch_line(before: Batching | None, after: Batching | None) -> str:
    """What the changes mean for the batches, or nothing when they are as before."""
    if before is None or after is None or before.summary() == after.summary():
        return ""
    return f"{before.summary()} → {after.summary()}"


def add(listing: Listing) -> None:
    """Keep it for `status` and log it, on the first process only."""
    _listings.append(listing)
    if os.environ.get("RANK", "0") == "0":
        logger.warning("rlpatch: %s\n  (apply(defaults=False) leaves every setting alone)", listing)


def listings() -> tuple[Listing, ...]:
    """The latest ones, oldest first."""
    return tuple(_listings)


def clear() -> None:
    """Forget them (on revert)."""
    _listings.clear()
