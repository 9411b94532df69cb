"""Where one step's time goes on the host: what Python is at in each phase (``bench --profile``).

A timer interrupts the main thread a thousand times a second and looks at its stack. A call into C is interrupted when it
returns: the time since the last look counts for the stack that made it, so that waiting for the device, launching a kernel
and copying count for the function that asked for them. A look takes some microseconds, and the step is hardly slowed.
"""

from __future__ import annotations

import signal
import time
from collections import defaultdict
from collections.abc import Sequence
from types import CodeType, FrameType
from typing import Any

from rlpatch.bench.memory_watch import Interval, phase_at

EVERY = 0.001  # seconds
_KEPT = 40  # functions of a phase, in either order

Stack = tuple[tuple[CodeType, str], ...]  # innermost first; code and its module


class HostProfile:
    """The main thread's stacks from construction to `stop`, `EVERY` so many seconds. To be used from that thread."""

    def __init__(self) -> None:
        self.looks: list[tuple[float, Stack]] = []
        self._before = signal.signal(signal.SIGALRM, self._look)
        self.began = time.perf_counter()
        self._timer = signal.setitimer(signal.ITIMER_REAL, EVERY)

    def _look(self, number: int, frame: FrameType | None) -> None:
        stack = []
        while frame is not None and frame.f_code is HostProfile._look.__code__:  # interrupted as it was about to return
            frame = frame.f_back
        while frame is not None:
            stack.append((frame.f_code, frame.f_globals.get("__name__", "?")))
            frame = frame.f_back
        self.looks.append((time.perf_counter(), tuple(stack)))
        signal.setitimer(signal.ITIMER_REAL, EVERY)  # not earlier: on a busy machine a look takes longer than that

    def stop(self) -> None:
        """Look no more; whoever had the timer before has it again."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._before)
        left, every = self._timer
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.perf_counter() - self.began), EVERY), every)


def by_phase(
    looks: Sequence[tuple[float, Stack]], intervals: Sequence[Interval], begin: float, end: float
) -> dict[str, list[dict[str, Any]]]:
    """Per phase the functions in which Python was longest: seconds of their own, and with all that they called; those that
    were longest by themselves first. Without whoever was there all the time.

    Args:
        looks: Moments (``time.perf_counter``) and the stacks then, in order; each counts for the time since the one before.
        intervals: The phases of that step; what lies in none is training's.
    """
    phase_then = phase_at(intervals)
    own: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    called: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    before = begin
    for moment, stack in looks:
        if not begin <= moment < end or not stack:
            continue
        phase = phase_then((before + moment) / 2)
        names = [_name(code, module) for code, module in stack]
        own[phase][names[0]] += moment - before
        for name in set(names):
            called[phase][name] += moment - before
        before = moment
    made = {}
    for phase, spent in called.items():
        most = sorted(own[phase], key=lambda name: -own[phase][name])[:_KEPT]
        whole = max(spent.values())  # whoever has called the phase
        within = [name for name in spent if spent[name] < whole]
        most += [name for name in sorted(within, key=lambda name: -spent[name])[:_KEPT] if name not in most]
        made[phase] = [{"function": name, "own": own[phase].get(name, 0.0), "called": spent[name]} for name in most]
    return made


def _name(code: CodeType, module: str) -> str:
    return f"{module}:{getattr(code, 'co_qualname', code.co_name)}"  # co_qualname: Python 3.11
