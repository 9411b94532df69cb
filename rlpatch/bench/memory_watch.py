"""Memory over time and what was going on meanwhile: a polling thread, a clock of nested phases, and the two combined.

Device memory is read from the driver (``cudaMemGetInfo``): torch's counters miss nothing that torch allocated, but they
go on counting pool memory that has been unmapped, and know nothing of graphs, contexts and NCCL. On CPU it is the
process's resident set.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

ENGINE_START = "engine start"
LOAD = "load weights"
TRAIN = "train"
SETUP = "setup"


@dataclass(frozen=True)
class Interval:
    """One phase that has ended.

    Attributes:
        name: E.g. ``"sync"``.
        start: Seconds (``time.perf_counter``).
        end: Likewise.
        own: Seconds of it that no inner phase took.
        depth: 0 for a phase that lies in no other.
        step: Optimizer step it belongs to, from 0; -1 before training.
    """

    name: str
    start: float
    end: float
    own: float
    depth: int
    step: int


class Clock:
    """Nested phases of one thread. A phase inside one of the same name is part of it and not counted again.

    Args:
        synchronize: Called when a phase begins and ends, so that each pays for the device work it queued.

    Attributes:
        on_edge: Called just inside of a phase's beginning and end; gives short phases their samples of memory.
        step: Optimizer step that runs, from 0; -1 before training.
        failed_in: The innermost phase that an exception left, or None.
    """

    def __init__(self, synchronize: Callable[[], None] = lambda: None) -> None:
        self.synchronize = synchronize
        self.on_edge: Callable[[], None] = lambda: None
        self._stack: list[tuple[str, float, list[float]]] = []
        self.intervals: list[Interval] = []
        self.step = -1
        self.failed_in: str | None = None

    @property
    def innermost(self) -> str:
        """The phase that is running."""
        return self._stack[-1][0] if self._stack else (SETUP if self.step < 0 else TRAIN)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what happens inside as `name`; an exception leaves the innermost phase's name in `failed_in`."""
        if any(active == name for active, *_ in self._stack):
            yield
            return
        self.synchronize()
        inner: list[float] = []
        start = time.perf_counter()
        self._stack.append((name, start, inner))
        failed = False
        try:
            self.on_edge()
            yield
        except BaseException:
            failed = True
            self.failed_in = self.failed_in or name
            raise
        finally:
            if not failed:  # after a device error synchronize raises too, and would hide the first error
                self.synchronize()
                self.on_edge()
            end = time.perf_counter()
            self._stack.pop()
            if self._stack:
                self._stack[-1][2].append(end - start)
            self.intervals.append(Interval(name, start, end, end - start - sum(inner), len(self._stack), self.step))

    def book(self, name: str, seconds: float) -> None:
        """`seconds` that end now, in this thread, were the phase `name`; without effect outside of any phase."""
        if not self._stack or any(active == name for active, *_ in self._stack):
            return
        end = time.perf_counter()
        _, began, inner = self._stack[-1]
        seconds = max(0.0, min(seconds, end - began - sum(inner)))
        inner.append(seconds)
        self.intervals.append(Interval(name, end - seconds, end, seconds, len(self._stack), self.step))

    def seconds(self, step: int) -> dict[str, float]:
        """Phase → seconds of its own in optimizer step `step`; inner phases are not counted in outer ones."""
        found: dict[str, float] = {}
        for interval in self.intervals:
            if interval.step == step:
                found[interval.name] = found.get(interval.name, 0.0) + interval.own
        return found


class MemoryWatch:
    """A thread that samples used memory.

    Args:
        interval: Seconds between samples.
        clock: Polling pauses while the engine starts if this thread cannot be kept apart from graph capture.

    Attributes:
        samples: (seconds as of ``time.perf_counter``, bytes used).
    """

    def __init__(self, interval: float = 0.01, clock: Clock | None = None) -> None:
        import torch

        self.on_device = torch.cuda.is_available()
        self.samples: list[tuple[float, int]] = []
        self.error: str | None = None
        self._interval = interval
        self._clock = clock
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="memory-watch", daemon=True)

    def used(self) -> int:
        """Bytes in use: on the device by everybody (total − free), on CPU this process's resident set."""
        if not self.on_device:
            from rlpatch.demo.worker import resident_set

            return resident_set()
        import torch

        free, total = torch.cuda.mem_get_info()
        return int(total - free)

    def start(self) -> MemoryWatch:
        """Begin sampling."""
        self._thread.start()
        return self

    def stop(self) -> None:
        """End sampling and put the samples in order; safe to call twice."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)
        self.samples.sort()

    def sample(self) -> None:
        """Take one sample now, from any thread."""
        self.samples.append((time.perf_counter(), self.used()))

    def _poll(self) -> None:
        # While another thread captures a graph in "global" mode, CUDA may refuse calls from this one and break that
        # capture; the relaxed mode of a thread's own lifts that.
        apart = not self.on_device or _relaxed_capture_mode()
        while not self._stop.wait(self._interval):
            if not apart and self._clock is not None and self._clock.innermost == ENGINE_START:
                continue
            try:
                self.sample()
            except Exception as error:  # a device error belongs to the thread that caused it
                self.error = f"{type(error).__name__}: {error}"
                return


def _relaxed_capture_mode() -> bool:
    """Give the calling thread CU_STREAM_CAPTURE_MODE_RELAXED (2); False when the driver cannot be asked."""
    try:
        mode = ctypes.c_int(2)
        return int(ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))) == 0
    except (OSError, AttributeError):
        return False


def innermost_over_time(intervals: Iterable[Interval], outside: str = TRAIN) -> list[tuple[float, str]]:
    """Moments at which the innermost phase changes: sorted (seconds, name from then on); `outside` between phases."""
    ordered = sorted(intervals, key=lambda i: (i.start, i.depth))
    changes: list[tuple[float, str]] = [(float("-inf"), outside)]
    stack: list[Interval] = []

    def close(until: float) -> None:
        while stack and stack[-1].end <= until:
            ended = stack.pop()
            changes.append((ended.end, stack[-1].name if stack else outside))

    for interval in ordered:
        close(interval.start)
        changes.append((interval.start, interval.name))
        stack.append(interval)
    close(float("inf"))
    return changes


def phase_at(intervals: Iterable[Interval]) -> Callable[[float], str]:
    """Moment (seconds of ``time.perf_counter``) -> the innermost phase then; what lies in none is training's."""
    changes = innermost_over_time(intervals)
    times = [moment for moment, _ in changes]
    return lambda moment: changes[bisect_right(times, moment) - 1][1]


def memory_by_phase(
    samples: Iterable[tuple[float, int]], intervals: Iterable[Interval], since: float, until: float
) -> dict[str, dict[str, int]]:
    """Phase → ``{"max", "min", "samples"}``: bytes over the samples in [since, until] while it was the innermost."""
    phase = phase_at(intervals)
    found: dict[str, dict[str, int]] = {}
    for moment, used in samples:
        if since <= moment <= until:
            row = found.setdefault(phase(moment), {"max": used, "min": used, "samples": 0})
            row["max"], row["min"] = max(row["max"], used), min(row["min"], used)
            row["samples"] += 1
    return found


def decimate(samples: Sequence[tuple[float, int]], most: int) -> list[tuple[float, int]]:
    """At most `most` of the samples: the lowest and the highest of each stretch, in order of time."""
    if len(samples) <= most:
        return list(samples)
    buckets = max(1, most // 2)
    kept: list[tuple[float, int]] = []
    for bucket in range(buckets):
        stretch = samples[bucket * len(samples) // buckets : (bucket + 1) * len(samples) // buckets]
        if stretch:
            kept.extend(
                sorted({min(stretch, key=lambda sample: sample[1]), max(stretch, key=lambda sample: sample[1])})
            )
    return kept


def timeline(
    samples: Sequence[tuple[float, int]], intervals: Sequence[Interval], origin: float, training: float
) -> dict[str, Any]:
    """Plain data for a plot, at most 2000 samples (400 before `training` begins).

    Args:
        origin: The moment that becomes second 0.
        training: When training began.

    Returns:
        ``seconds`` and ``mib`` (parallel lists), ``phases`` (``[name, start, end, depth, step]``), ``training``.
    """
    before = decimate([s for s in samples if s[0] < training], 400)
    kept = before + decimate([s for s in samples if s[0] >= training], 1600)
    return {
        "seconds": [round(moment - origin, 4) for moment, _ in kept],
        "mib": [round(used / 2**20, 2) for _, used in kept],
        "phases": [
            [i.name, round(i.start - origin, 4), round(i.end - origin, 4), i.depth, i.step]
            for i in sorted(intervals, key=lambda i: (i.start, i.depth))
        ],
        "training": round(training - origin, 4),
    }
