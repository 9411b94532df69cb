"""What a kernel takes the device, in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

T = TypeVar("T")
_LAUNCHES = 24  # for one timing: what events and a first launch take is little beside them


def timed(run: Callable[[T], Any], on: Sequence[T]) -> float:
    """Seconds that `run` takes the device for one of `on`, in turn: the fastest of three rounds.

    In a CUDA graph, as decode steps have it: from a stream, one kernel takes 1 µs longer, and another 3.
    """
    turns = [on[i % len(on)] for i in range(_LAUNCHES)]
    run(turns[0])  # compiled, and its libraries loaded
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # torch.cuda.graph() would run the garbage collector each time
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for turn in turns:
                run(turn)
        finally:
            graph.capture_end()
        times = []
        for _ in range(3):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3 / _LAUNCHES)
    return min(times)
