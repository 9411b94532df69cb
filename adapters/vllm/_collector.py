"""Python's garbage collector while an engine is built in the trainer's process.

A full collection walks every container in the process: here the trainer's, too. vLLM asks for a dozen of them while it
builds an engine (``MemorySnapshot``, ``memory_profiling``, ``CuMemAllocator``, the capture, ``freeze_gc_heap``), and
capturing a CUDA graph allocates many small objects, each of which may start another. Freezing moves what is there out of
the collector's sight, switching it off keeps it from starting. Nothing of this outlives the build, whatever happens in it.
"""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Iterator
from typing import Any

from rlpatch.collector import back_in_sight, frozen, out_of_sight
from rlpatch.patching import Patch
from rlpatch.versions import environment_flag

logger = logging.getLogger("rlpatch")


_SWITCH = "VLLM_ENABLE_CUDAGRAPH_GC"  # vLLM's own: leave the collector alone
_held: list[None] | None = None  # made just after `_build` froze what was there: whoever freezes more freezes it


def _hold() -> None:
    global _held
    gc.freeze()
    _held = [None]


@contextlib.contextmanager
def at_rest() -> Iterator[None]:
    """Nothing is collected in the block, and what exists now is `out_of_sight` of whoever collects by hand.

    ``VLLM_ENABLE_CUDAGRAPH_GC=1`` leaves the collector alone.
    """
    if environment_flag(_SWITCH):
        yield
        return
    enabled = gc.isenabled()
    with out_of_sight():
        gc.disable()
        try:
            yield
        finally:
            if _held is not None and not frozen():  # vLLM's own rest inside of this one ends with thawing all
                _hold()
            if enabled:
                gc.enable()


def _capture(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with at_rest():
        return wrapped(*args, **kwargs)


# Engines whose heap was thawed. Frozen, an engine is never collected; thawed it would be, some time after its trainer, and
# ``EngineCore.shutdown`` then destroys the process group under the next trainer of this process.
_kept: dict[int, Any] = {}


def _build(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    global _held
    back_in_sight()  # a callback of a trainer builds another one's engine
    before = frozen()
    holds = not before and not environment_flag(_SWITCH)
    if holds:
        gc.collect()  # what is garbage now may hold the device's memory, which vLLM is about to measure
        _hold()
    try:
        return wrapped(*args, **kwargs)
    finally:
        if not before:
            vllm_froze = frozen() > 0 and not any(one is _held for one in gc.get_objects())
            gc.unfreeze()
            if vllm_froze:
                _kept[id(instance)] = instance
        elif (added := gc.get_freeze_count() - before) > 0:
            logger.info(
                "rlpatch: vLLM froze %d objects, which are never collected now; they stay frozen, because %d were before "
                "and the collector cannot thaw a part (call gc.unfreeze() before the engine is built)",
                added, before,
            )  # fmt: skip
        if holds:
            _held = None


def _shutdown(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    _kept.pop(id(instance), None)
    return wrapped(*args, **kwargs)


# ``EngineCore.__init__`` ends with ``freeze_gc_heap()`` (0.11.1 and later), which is meant for a process of its own. In
# process the client builds the core, so that the wrapper never runs in an engine's own process.
BUILD = Patch("vllm.v1.engine.core_client", "InprocClient.__init__", _build)
SHUTDOWN = Patch("vllm.v1.engine.core_client", "InprocClient.shutdown", _shutdown)
CAPTURE_V1 = Patch("vllm.v1.worker.gpu_model_runner", "GPUModelRunner.capture_model", _capture)
V2_RUNNER = "vllm.v1.worker.gpu.model_runner"
CAPTURE_V2 = Patch(V2_RUNNER, "GPUModelRunner.capture_model", _capture)
