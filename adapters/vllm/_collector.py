"""Python's garbage collector while an engine is built in the trainer's process.

Capturing a CUDA graph allocates many small objects, each allocation may start a collection, and a full one walks every
container in the process: here the trainer's, too. Freezing moves all of them out of the collector's sight, switching it
off keeps it from starting. Nothing of this outlives the capture, whatever happens in it.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
from collections.abc import Iterator
from typing import Any

from rlpatch.adapters.vllm._platform import has
from rlpatch.patching import Patch
from rlpatch.versions import environment_flag

logger = logging.getLogger("rlpatch")


@contextlib.contextmanager
def at_rest() -> Iterator[None]:
    """Collect once, then neither collect nor look at what exists now until the end of the block.

    ``VLLM_ENABLE_CUDAGRAPH_GC=1``, vLLM's own switch, leaves the collector alone. What was frozen before stays so: the
    collector cannot thaw a part, so nothing is added to it then.
    """
    if environment_flag("VLLM_ENABLE_CUDAGRAPH_GC"):
        yield
        return
    enabled, frozen = gc.isenabled(), gc.get_freeze_count()
    gc.collect()
    if not frozen:
        gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        if not frozen:
            gc.unfreeze()
        if enabled:
            gc.enable()


def _capture(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with at_rest():
        return wrapped(*args, **kwargs)


# Engines whose heap was thawed. Frozen, an engine is never collected; thawed it would be, some time after its trainer, and
# ``EngineCore.shutdown`` then destroys the process group under the next trainer of this process.
_kept: dict[int, Any] = {}


def _build(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    frozen = gc.get_freeze_count()
    try:
        return wrapped(*args, **kwargs)
    finally:
        added = gc.get_freeze_count() - frozen
        if not frozen and added > 0:
            gc.unfreeze()
            _kept[id(instance)] = instance
        elif frozen and added > 0:
            logger.info(
                "rlpatch: vLLM froze %d objects, which are never collected now; they stay frozen, because %d were before "
                "and the collector cannot thaw a part (call gc.unfreeze() before the engine is built)",
                added, frozen,
            )  # fmt: skip


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


def rests_itself() -> bool:
    """Whether vLLM rests the collector for both runners."""
    if not has("vllm.utils.gc_utils"):
        return False
    return hasattr(importlib.import_module("vllm.utils.gc_utils"), "freeze_gc_for_cudagraph_capture")
