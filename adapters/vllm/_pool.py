"""KV memory in vLLM's cumem pool, allocation by allocation (releases before the native KV-only release)."""

from __future__ import annotations

import inspect
import logging
import os
from typing import Any

import torch

from rlpatch.adapters.vllm._pieces import GRANULE, Pieces, Span, as_made, in_the_pools_handles, map_what_fits, take_out
from rlpatch.engine import Engine, synchronize
from rlpatch.errors import StandbyError
from rlpatch.standby import ResizedStorages, make_room

logger = logging.getLogger("rlpatch")


class PoolAllocations:
    """Unmap and map just the pool allocations that back the KV cache.

    Until 0.29 everything that ``initialize_kv_cache`` allocates carries the tag ``kv_cache``: block tables, input
    buffers and metadata too. Those siblings must stay mapped, so allocations are picked by address, never by tag; and
    until 0.28 ``CuMemAllocator.wake_up`` maps what is mapped already, so its own ``sleep``/``wake_up`` are not used.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._allocations = self._find()
        self._pieces: Pieces | None = as_made(self._allocations)

    def _find(self) -> list[Any]:
        from vllm.device_allocator.cumem import CuMemAllocator

        allocations = CuMemAllocator.get_instance().pointer_to_data
        spans = [(s.data_ptr(), s.nbytes()) for s in (t.untyped_storage() for t in self._engine.kv_tensors())]
        found = []
        for base, data in allocations.items():
            size = data.handle[1]
            held = sum(nbytes for start, nbytes in spans if base <= start < base + size)
            # An allocation that KV tensors do not fill may hold something else besides.
            if held and held > size - GRANULE:
                found.append(data)
        if not found:
            raise StandbyError(
                f"none of the {len(allocations)} allocations in vLLM's memory pool backs the KV cache alone; was the "
                "engine built without enable_sleep_mode, or is its KV cache under 2 MiB?"
            )
        return found

    def free(self) -> None:
        """Unmap; whatever uses the KV cache has been waited for."""
        if self._pieces is not None:
            take_out(self._pieces, self._allocations)
            self._pieces = None
            mark(self._allocations, True)

    def back(self) -> int | None:
        """Map at the same addresses; returns the number of blocks if memory does not suffice for all of them.

        Raises:
            RuntimeError: it does not suffice for any; nothing is mapped then.
        """
        make_room(self._engine.device)
        if self._pieces is not None:  # of a restore that failed later on
            synchronize(self._engine.device)
            self.free()
        self._pieces = map_what_fits(self._engine, self._allocations)
        mark(self._allocations, False)
        return self._pieces.blocks

    def hand_over(self) -> None:
        """See `rlpatch.standby.Mechanism`."""
        if self._pieces is not None:
            self._pieces = in_the_pools_handles(self._pieces, self._allocations)

    def backed(self) -> list[Span] | None:
        """The addresses that are mapped, if only some are."""
        return None if self._pieces is None or self._pieces.blocks is None else self._pieces.spans

    def resident_bytes(self) -> int:
        """Bytes mapped for the KV cache now."""
        return 0 if self._pieces is None else self._pieces.resident_bytes()


def mark(allocations: list[Any], asleep: bool) -> None:
    """Tell the pool's own ``sleep`` and ``wake_up``, which consult it where it exists, what has become of `allocations`."""
    for data in allocations:
        if hasattr(data, "is_asleep"):
            data.is_asleep = asleep


@torch.inference_mode()
def settle(engine: Engine, memory: PoolAllocations | ResizedStorages) -> None:
    """After `back`: what must not start from stale bytes.

    Upstream does it after a wake (``init_fp8_kv_scales``, 0.12; ``post_kv_cache_wake_up``, 0.22 to 0.28): it zeroes a
    quantized cache, whose bytes may read as NaN, and fills the scales with 1.0. The scales are the weights' and stayed
    mapped here; filling them would lose calibrated ones. The V2 runner computes block-table layouts anew instead, which
    its hook alone does.
    """
    after = getattr(engine.runner, "post_kv_cache_wake_up", None)
    if after is not None and not hasattr(engine.runner, "init_fp8_kv_scales"):
        after()
    for tensor in engine.kv_tensors():
        if tensor.element_size() == 1:
            whole = torch.empty(0, dtype=torch.uint8, device=tensor.device)
            whole.set_(tensor.untyped_storage())  # type: ignore[call-overload]
            for start, end in _within(whole, memory.backed()):
                whole[start:end].zero_()


def _within(flat: torch.Tensor, backed: list[Span] | None) -> list[Span]:
    """The offsets in `flat`, a tensor of bytes, of the addresses that are backed (None: all)."""
    if backed is None:
        return [(0, flat.numel())]
    base = flat.data_ptr()
    offsets = ((max(0, start - base), min(end - base, flat.numel())) for start, end in backed)
    return [(start, end) for start, end in offsets if start < end]


def expandable_segments_refused() -> str | None:
    """Why this release's pool cannot be had beside the allocator options in force, or None (0.9 to 0.20.0 assert it)."""
    from rlpatch.adapters.vllm._platform import on_cpu

    if on_cpu() or "expandable_segments:True" not in os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""):
        return None
    from vllm.device_allocator.cumem import CuMemAllocator

    if "Expandable segments are not compatible" not in inspect.getsource(CuMemAllocator.__init__):
        return None
    return (
        "PYTORCH_CUDA_ALLOC_CONF has expandable_segments:True, and this vLLM's memory pool asserts that they are off; take "
        "them out to have standby"
    )


def kv_memory(engine: Engine) -> PoolAllocations | ResizedStorages:
    """The memory side of standby for this engine's device."""
    return ResizedStorages(engine) if engine.device.type == "cpu" else PoolAllocations(engine)
