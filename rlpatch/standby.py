"""Standby: the KV cache's memory exists only while tokens are generated.

`KVStandby` is the cycle, the same for every release; a `Mechanism`, brought by an adapter, knows how one era of vLLM
pauses and lets memory go. `ResizedStorages` is the memory side on CPU, where no allocator pool exists.
"""

from __future__ import annotations

import logging
import time
from typing import Protocol

import torch

from rlpatch.blocks import BlockLimit
from rlpatch.engine import Engine, synchronize
from rlpatch.errors import StandbyError
from rlpatch.interrupts import deferred

logger = logging.getLogger("rlpatch")


class Mechanism(Protocol):
    """How one era of vLLM releases the memory behind the KV cache and gets it back.

    ``release`` is called on an engine at rest (drained, its last kernel waited for). Weights, graphs and small metadata
    buffers stay mapped.
    """

    def __init__(self, engine: Engine) -> None: ...

    def release(self) -> None:
        """Pause scheduling, forget every cache that describes or uses KV memory, free that memory."""

    def restore(self) -> int | None:
        """Get the memory back at the same addresses (CUDA) and resume scheduling. Contents are undefined.

        Returns:
            How many blocks are backed, counted from block 0, if memory did not suffice for all of them; None: all.
        """

    def hand_over(self) -> None:
        """Leave the restored memory to the engine's own sleep mode, which must be able to let it go. Contents are lost.

        Called on an engine at rest.
        """

    def resident_bytes(self) -> int:
        """Bytes of KV memory that are backed right now."""


class KVStandby:
    """The release/restore cycle of one engine.

    Attributes:
        released: Whether the KV cache is out right now.
        cycles: Completed releases.
        blocks: Which of its blocks may be used; None as long as all of them have come back every time.
        seconds: Seconds spent releasing and restoring, in total.
    """

    def __init__(self, engine: Engine, mechanism: Mechanism) -> None:
        self.engine = engine
        self.mechanism = mechanism
        self.released = False
        self.cycles = 0
        self.blocks: BlockLimit | None = None
        self._bytes = sum(tensor.untyped_storage().nbytes() for tensor in engine.kv_tensors())
        self.seconds = {"release": 0.0, "restore": 0.0}

    def rest(self) -> None:
        """Bring the engine to rest: unfinished requests are aborted, the device's running work is waited for.

        Raises:
            StandbyError: the engine does not come to rest.
        """
        start = time.perf_counter()
        aborted = self.engine.abort_requests()
        if aborted:
            logger.warning("rlpatch: aborted %d unfinished requests before releasing the KV cache", aborted)
        self.engine.drain()
        synchronize(self.engine.device)
        self.seconds["release"] += time.perf_counter() - start

    def release(self, *, at_rest: bool = False) -> None:
        """Let the KV cache go, once the engine has come to rest.

        Args:
            at_rest: It has (`rest` was called). What the device was given since does not touch the KV cache and is not
                waited for: unmapping and running kernels do not hinder each other (20 to 28 ms for 40 GiB on an H200,
                idle or busy).

        Raises:
            StandbyError: it is released already, or the engine does not come to rest.
        """
        if self.released:
            raise StandbyError("the KV cache is released already; call restore() before releasing it again")
        if not at_rest:
            self.rest()
        start = time.perf_counter()
        with deferred():  # else an engine may be left that is paused and does not count as released
            self.mechanism.release()
            self.released = True
            self.cycles += 1
        self.seconds["release"] += time.perf_counter() - start

    def restore(self) -> None:
        """Get the KV cache back, empty.

        Raises:
            StandbyError: it is not released, or its memory cannot be had; the trainer and its weights are untouched.
        """
        if not self.released:
            raise StandbyError("the KV cache is not released; call release() before restoring it")
        start = time.perf_counter()
        with deferred():  # likewise: memory that nobody knows to be mapped cannot be mapped again
            backed = self._restored()
            self.released = False
            self._use(backed)
        self.seconds["restore"] += time.perf_counter() - start

    def _restored(self) -> int | None:
        try:
            return self.mechanism.restore()
        except (RuntimeError, MemoryError) as error:
            free = (
                f", {torch.get_device_module(self.engine.device).mem_get_info()[0] >> 20} MiB are free"
                if self.engine.device.type != "cpu"
                else ""
            )
            raise StandbyError(
                f"the KV cache ({self._bytes >> 20} MiB) cannot be restored: {error}{free}. Lower "
                "vllm_gpu_memory_utilization (it sized the KV cache) or leave it unset, so that the memory plan does, or "
                "free memory before generating; the trainer and its weights are intact"
            ) from error

    def hand_over(self) -> None:
        """The restored KV cache is the engine's alone from now on, its own sleep mode included.

        Not while requests run: what they have computed lies in it.

        Raises:
            RuntimeError: its memory cannot be had again.
        """
        if self.released or getattr(self.engine.llm.llm_engine.output_processor, "request_states", {}):
            return
        self.rest()
        self.engine.llm.reset_prefix_cache()
        self.mechanism.hand_over()

    def _use(self, backed: int | None) -> None:
        if self.blocks is None:
            if backed is None:
                return
            self.blocks = BlockLimit(self.engine)
        before = self.blocks.usable
        try:
            self.blocks.use(backed)
        except StandbyError:
            self.release()  # nothing may be scheduled into what is not backed
            raise
        if self.blocks.usable < min(before, self.blocks.total):
            logger.warning(
                "rlpatch: the KV cache came back with %d of %d blocks: the device has no room for more (it takes %d MiB "
                "in all); vLLM will queue or preempt what does not fit", self.blocks.usable, self.blocks.total,
                self._bytes >> 20,
            )  # fmt: skip


def make_room(device: torch.device) -> None:
    """Give the blocks that torch's allocator caches back to the device: before the KV cache comes, and when the trainer's
    weights have moved into the engine.

    After an optimizer step these are mostly the gradients' (14 GiB of an 8B model). Keeping them while memory suffices
    saves 1 % of a step (18 ms of the restore and 5 ms of the next backward, 8B on an H200), but would leave the device
    as full while generating as if the weights were there twice.
    """
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()  # torch.accelerator cannot do it in the torch of vLLM 0.9 to 0.11


class ResizedStorages:
    """KV memory on CPU: each storage is resized to nothing and back, so that the process really gives it back.

    Views made by the engine's layers share these storages and follow. Unlike on CUDA the address changes; on CPU no
    graph has captured it. The engine zeroes a block before it reads more than it wrote, yet fresh memory is zeroed here
    because stale bytes could be NaN.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._sizes: list[tuple[torch.UntypedStorage, int]] = []

    def free(self) -> None:
        """Release the storages. Raises StandbyError when there is no KV cache to release."""
        tensors = self._engine.kv_tensors()
        if not tensors:
            raise StandbyError("this engine has no KV cache tensors; switch standby off for it")
        self._sizes = [(storage, storage.nbytes()) for storage in (t.untyped_storage() for t in tensors)]
        for storage, _ in self._sizes:
            storage.resize_(0)

    def back(self) -> None:
        """Allocate the storages again, zeroed."""
        for storage, size in self._sizes:
            storage.resize_(size)
            torch.empty(0, dtype=torch.uint8).set_(storage).zero_()  # type: ignore[call-overload]
        self._sizes = []

    def hand_over(self) -> None:
        """Nothing: they are as the engine made them."""

    def backed(self) -> None:
        """Which addresses are backed, if only some are: never."""

    def resident_bytes(self) -> int:
        """Bytes behind the KV cache now."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self._engine.kv_tensors())
