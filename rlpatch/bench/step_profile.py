"""Where one step's time goes on the device: what runs in each phase, by kind (``bench --profile``).

A step more than was asked for, left out of all medians, runs under torch's profiler. It records kernels and copies alone,
no calls of the host; each launch gets dearer all the same, so that a phase in which the device waits for the host (a small
model's decoding) takes up to twice its time, and others hardly more. How long the device works is not touched by that.
Kernels belong to the innermost phase in which they start; phases end when the device is done. Beside the bench's phases a
profiled step has `PARTS` of training, and the optimizer's. On a CPU operators stand for kernels, those that compute and
have none like them inside.
"""

from __future__ import annotations

import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rlpatch.bench.memory_watch import TRAIN, Interval, phase_at

# phase -> what it is in TRL and accelerate
PARTS: tuple[tuple[str, str, str], ...] = (
    ("rewards", "trl.trainer.grpo_trainer", "GRPOTrainer._calculate_rewards"),
    ("log-probs", "trl.trainer.grpo_trainer", "GRPOTrainer._get_per_token_logps_and_entropies"),
    ("backward", "accelerate.accelerator", "Accelerator.backward"),
    ("clipping", "accelerate.accelerator", "Accelerator.clip_grad_norm_"),
    ("logging", "trl.trainer.grpo_trainer", "GRPOTrainer.log"),
)
OTHER = "other"
KINDS: tuple[tuple[str, str], ...] = (
    ("copies", r"^memcpy|^memset|aten::copy_"),
    ("attention", r"flash|fmha|attention|attn|paged|decode_kernel"),
    ("matrix products", r"gemm|gemv|nvjet|cutlass|xmma|splitk|cublas|skinny_kernel|aten::(add)?mm|aten::linear"),
    ("KV cache", r"cache"),
    (
        "sampling, log-probs",
        r"sampl|softmax|sort|top_?[kp]|argmax|multinomial|exponential|gumbel|log_?prob|distribution",
    ),
    ("optimizer", r"adam|multi_tensor|foreach"),
    ("norms, rotary, activations", r"norm|rotary|silu|gelu|act_and_mul"),
)
_PATTERNS = tuple((kind, re.compile(pattern)) for kind, pattern in KINDS)
# operators that touch no values
_VIEWS = re.compile(
    r"resolve_|view|as_strided|transpose|permute|squeeze|expand|slice|select|detach|alias|reshape|empty|::t$|::to$"
)
_NAME, _KEPT = 90, 12  # characters of a kernel's name, kernels of a phase
_MARKS = 8


@dataclass(frozen=True)
class Event:
    """Something that ran: a kernel, a copy, on a CPU an operator. Seconds of ``time.perf_counter``."""

    name: str
    start: float
    end: float


def kind_of(name: str) -> str:
    """What a kernel of that name does, as far as names tell."""
    low = name.lower()
    return next((kind for kind, pattern in _PATTERNS if pattern.search(low)), OTHER)


def busy(spans: Iterable[tuple[float, float]]) -> float:
    """Seconds in which at least one of the spans runs."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def phase_seconds(intervals: Sequence[Interval], begin: float, end: float) -> dict[str, float]:
    """Phase -> its own seconds, without those of phases in it; what of the step lies in none is training's."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for one in intervals:
        seconds[one.name] += one.own
    seconds[TRAIN] += end - begin - sum(seconds.values())
    return dict(seconds)


def by_phase(events: Sequence[Event], intervals: Sequence[Interval], begin: float, end: float) -> dict[str, Any]:
    """Per phase: its own seconds, those in which the device worked, and the sum by kind; and the longest kernels.

    Args:
        events: What ran between `begin` and `end` (seconds of ``time.perf_counter``).
        intervals: The phases of that step; what lies in none is training's.
    """
    phase = phase_at(intervals)
    found: dict[str, list[Event]] = {}
    for event in events:
        if begin <= event.start < end:
            found.setdefault(phase(event.start), []).append(event)
    seconds = phase_seconds(intervals, begin, end)
    phases = {}
    for name in seconds:
        kinds: defaultdict[str, float] = defaultdict(float)
        kernels: defaultdict[str, float] = defaultdict(float)
        counts: Counter[str] = Counter()
        for event in found.get(name, []):
            kinds[kind_of(event.name)] += event.end - event.start
            kernels[event.name[:_NAME]] += event.end - event.start
            counts[event.name[:_NAME]] += 1
        phases[name] = {
            "seconds": seconds[name],
            "busy": busy((event.start, event.end) for event in found.get(name, [])),
            "kinds": dict(sorted(kinds.items(), key=lambda one: -one[1])),
            "kernels": [
                {"name": kernel, "kind": kind_of(kernel), "seconds": spent, "count": counts[kernel]}
                for kernel, spent in sorted(kernels.items(), key=lambda one: -one[1])[:_KEPT]
            ],
        }
    return {"seconds": end - begin, "phases": phases}


class StepProfile:
    """torch's profiler over one step.

    Args:
        synchronize: Waits for the device.
    """

    def __init__(self, synchronize: Callable[[], None]) -> None:
        import torch
        from torch.profiler import ProfilerActivity, profile

        self._synchronize = synchronize
        self._cuda = torch.cuda.is_available()
        self._profiler = profile(activities=[ProfilerActivity.CUDA if self._cuda else ProfilerActivity.CPU])
        self._profiler.start()
        synchronize()
        # What is recorded first tells how the profiler's clock and ours stand to each other. Whatever was slow about a
        # mark, such as a process's first operator under a profiler, would look like a difference: the quickest tells.
        self._marks: list[tuple[float, float]] = []  # seconds it took, when it began
        for _ in range(_MARKS):
            began = time.perf_counter()
            torch.zeros(8, device="cuda" if self._cuda else "cpu")
            synchronize()
            self._marks.append((time.perf_counter() - began, began))

    def events(self) -> list[Event]:
        """End it; what ran since."""
        self._synchronize()
        self._profiler.stop()
        recorded = sorted(_recorded(self._profiler, self._cuda), key=lambda one: one.start)
        if not recorded:
            return []
        (_, began), mark = min(zip(self._marks, recorded, strict=False), key=lambda one: one[0])
        shift = began - mark.start
        return [Event(one.name, one.start + shift, one.end + shift) for one in recorded]


def _recorded(profiler: Any, cuda: bool) -> list[Event]:
    """On the profiler's clock; operators only if no other begins inside of them."""
    threads: dict[int, list[Event]] = {}
    for event in profiler.profiler.kineto_results.events():
        if event.is_user_annotation():  # a span around kernels, such as an optimizer's step
            continue
        on_device = "CUDA" in str(event.device_type())
        if on_device == cuda and (cuda or (event.name().startswith("aten::") and not _VIEWS.search(event.name()))):
            start = event.start_ns() / 1e9
            one = Event(event.name(), start, start + event.duration_ns() / 1e9)
            threads.setdefault(0 if cuda else event.start_thread_id(), []).append(one)
    if cuda:
        return [event for events in threads.values() for event in events]
    leaves = []
    for events in threads.values():
        events.sort(key=lambda one: (one.start, -one.end))
        starts = [*(one.start for one in events[1:]), float("inf")]
        leaves += [one for one, following in zip(events, starts, strict=True) if following >= one.end]
    return leaves


def read_bandwidth() -> float | None:
    """Bytes per second at which this GPU reads, measured: the sum of a large tensor; None on a CPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    size = min(4 << 30, torch.cuda.mem_get_info()[0] // 4) // 4
    large = torch.zeros(size, dtype=torch.float32, device="cuda")
    seconds = []
    for _ in range(4):
        torch.cuda.synchronize()
        began = time.perf_counter()
        large.sum()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return 4 * size / min(seconds[1:])
