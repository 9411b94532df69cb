"""What Triton's compiler takes, kernel by kernel.

Triton calls ``triton.knobs.compilation.listener`` (3.4 and later) after each compilation and each look into its cache with
what that took. Inductor's compile processes are not heard.
"""

from __future__ import annotations

import contextlib
import importlib.util
import threading
from typing import Any

from rlpatch.bench.memory_watch import Clock

PHASE = "triton"
_MOST = 12  # kernels that are told one by one


class TritonClock:
    """Listens to Triton's compiler from `start` on; inside of a phase of `clock` its seconds are a phase of their own."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._thread = threading.get_ident()
        self._lock = threading.Lock()
        self._compiled: dict[str, list[float]] = {}
        self._cached: list[float] = []

    def start(self) -> str | None:
        """From now on, beside whatever listens already. Returns why not (this Triton tells nothing), or None."""
        if importlib.util.find_spec("triton") is None:
            return None
        try:
            from triton import knobs  # type: ignore[import-not-found,unused-ignore]

            before = knobs.compilation.listener
        except (ImportError, AttributeError):
            return "triton.knobs.compilation.listener (Triton 3.4 and later)"

        def listener(*, src: Any, times: Any, cache_hit: bool, **others: Any) -> None:
            with contextlib.suppress(Exception):  # an error here would be one of the kernel's
                self._add(str(getattr(src, "name", src)), times.total / 1e6, cache_hit)
            if before is not None:
                before(src=src, times=times, cache_hit=cache_hit, **others)

        knobs.compilation.listener = listener
        return None

    def _add(self, name: str, seconds: float, cached: bool) -> None:
        with self._lock:
            if cached:
                self._cached.append(seconds)
            else:
                self._compiled.setdefault(name, []).append(seconds)
        if threading.get_ident() == self._thread:
            self.clock.book(PHASE, seconds)

    def take(self) -> dict[str, Any] | None:
        """What was heard since the last `take`: seconds and number of compilations, of kernels found in the cache, and the
        seconds of the kernels that took longest; None: nothing was."""
        with self._lock:
            compiled, cached = self._compiled, self._cached
            self._compiled, self._cached = {}, []
        if not compiled and not cached:
            return None
        by_kernel = {name: sum(seconds) for name, seconds in compiled.items()}
        return {
            "seconds": sum(by_kernel.values()),
            "compiled": sum(map(len, compiled.values())),
            "cached_seconds": sum(cached),
            "cached": len(cached),
            "largest": dict(sorted(by_kernel.items(), key=lambda one: -one[1])[:_MOST]),
        }
