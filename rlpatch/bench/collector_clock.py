"""What Python's garbage collector takes of each step, and how much of that while tokens are generated."""

from __future__ import annotations

import gc
import time
from typing import Any

from rlpatch.bench.memory_watch import Clock


class CollectorClock:
    """Listens to the collector (``gc.callbacks``) between `start` and `stop`, and asks `clock` for step and phase.

    Attributes:
        by_phase: The innermost phase -> seconds, over all steps.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._steps: dict[int, dict[str, float]] = {}
        self._began = 0.0
        self.by_phase: dict[str, float] = {}

    def start(self) -> None:
        """From now on."""
        gc.callbacks.append(self._event)

    def stop(self) -> None:
        """No longer."""
        gc.callbacks.remove(self._event)

    def _event(self, event: str, info: dict[str, Any]) -> None:
        if event == "start":
            self._began = time.perf_counter()
            return
        seconds = time.perf_counter() - self._began
        step = self._steps.setdefault(self.clock.step, {"seconds": 0.0, "generate": 0.0, "full": 0})
        step["seconds"] += seconds
        self.by_phase[self.clock.innermost] = self.by_phase.get(self.clock.innermost, 0.0) + seconds
        step["generate"] += seconds if self.clock.innermost == "generate" else 0.0
        step["full"] += info["generation"] == 2

    def of(self, step: int) -> dict[str, float]:
        """``seconds`` of a step, those while generating (``generate``), and the number of ``full`` collections."""
        return dict(self._steps.get(step, {"seconds": 0.0, "generate": 0.0, "full": 0}))
