"""The garbage collector rests during rollouts.

Every token leaves objects behind that the collector counts (log-probs above all), so that rollouts start most of its full
collections, and a full one walks whatever the process holds, here the trainer's hundreds of thousands of objects. vLLM
freezes the heap when an engine has been built (``freeze_gc_heap``, for a process of its own), after which that is cheap;
beside a trainer the heap is thawed again (`_collector`), after which it is not. The pause lasts until the trainer has taken
what it keeps out of vLLM's outputs: what goes then goes by its reference counts, and nothing is left to collect.
`rlpatch.phases.Colocation.rollout` does the rest.
Delete when: vLLM rests the collector while it generates, or the oldest supported Python collects in small increments.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

from rlpatch.registry import Adapter
from rlpatch.relies import Relies


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """No collection starts by itself in the block; afterwards all is as before."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


ADAPTER = Adapter(
    capability="rollout_gc",
    library="vllm",
    versions=">=0.9.2,<0.34",
    module="vllm.entrypoints.llm",
    provides=paused,
    relies_on=(
        Relies("vllm.entrypoints.llm:LLM.generate", lacks=("gc.disable()",)),
        Relies("vllm.entrypoints.llm:LLM._run_engine", lacks=("gc.disable()",)),
    ),
)
