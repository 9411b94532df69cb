"""A KV cache's memory, mapped piece by piece: all of it, or its first blocks where the device has no room for more.

vLLM's pool maps an allocation with one handle, all or nothing. Its C extension can do more: ``create_and_map(device, size,
address, slot)`` creates `size` bytes, maps them at `address` and writes the driver's handle into the 8 bytes at `slot`, and
``unmap_and_release`` with the same arguments is the inverse (vLLM ``csrc/cumem_allocator.cpp``, the same on CUDA in every
release). The addresses stay reserved for as long as the allocation lives, so any granules of it can be mapped, each run of
them with a slot of ours. When the allocation ends, the pool unmaps it by the handle in its own books, which it must have
again by then (`give_back`). ROCm builds take a list of chunks instead of a slot; there it stays all or nothing.

Pieces are mapped by the driver itself where that is possible: memory as the extension asks for it is slow to get (see
`_driver`).

Which bytes block n has in a tensor follows from its strides: K and V may be planes of their own, layers may be views of
one storage, and groups of layers may share bytes.
"""

from __future__ import annotations

import bisect
import ctypes
import itertools
import logging
from collections.abc import Iterable
from typing import Any

import torch

from rlpatch.adapters.vllm._driver import Driver, Handle, driver
from rlpatch.adapters.vllm._platform import on_cpu
from rlpatch.engine import Engine
from rlpatch.memory import Engine as PlannedEngine
from rlpatch.memory import default_margin, from_config
from rlpatch.memory.engine import activation_bytes
from rlpatch.patching import Patch

logger = logging.getLogger("rlpatch")

GRANULE = 2 << 20  # what the driver maps; torch rounds large segments up to it, too
PIECE = 2 << 30  # bytes of one handle, at most
_LEAST = 2  # blocks; block 0 is a placeholder
_ACTIVATIONS = 1 << 30  # bytes, of an engine whose activations nobody knows
_TRIES = 2

# allocation's address -> what is mapped there that the pool's own handle does not stand for (None: nothing). Kept here and
# not by an engine: when its KV cache is freed, whatever belonged to it may be gone.
_taken: dict[int, Pieces | None] = {}

Span = tuple[int, int]  # addresses, the second one beyond the end


# ---- geometry ------------------------------------------------------------------------------------------------------


def block_dimension(tensor: torch.Tensor, total: int) -> int | None:
    """Which dimension of a KV tensor counts the blocks, or None.

    Every backend has it first, or second behind K and V: ``(2, blocks, …)``. Where its kernels want smaller blocks than
    the scheduler's, each of the `total` blocks is several rows.
    """
    if tensor.dim() < 2 or total <= 2:  # a flat buffer; a block dimension that K and V could be taken for
        return None
    return next((d for d in (0, 1) if tensor.shape[d] and tensor.shape[d] % total == 0), None)


def extent(tensor: torch.Tensor, blocks: int, total: int) -> list[Span]:
    """Addresses from the first byte of block 0 to the last byte of block ``blocks - 1``, once per plane.

    Raises:
        RuntimeError: no dimension of `tensor` counts `total` blocks.
    """
    dimension = block_dimension(tensor, total)
    if dimension is None:
        raise RuntimeError(f"a KV tensor of shape {tuple(tensor.shape)} does not tell where its {total} blocks are")
    if not blocks or not tensor.numel():
        return []
    rows, step = blocks * (tensor.shape[dimension] // total), tensor.stride(dimension)
    others = [(n, s) for d, (n, s) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)) if d != dimension]
    length = (rows - 1) * step + 1 + sum((n - 1) * s for n, s in others if s <= step)
    planes = itertools.product(*(range(0, n * s, s) for n, s in others if s > step and n > 1))
    width, start = tensor.element_size(), tensor.data_ptr()
    return [(start + sum(plane) * width, start + (sum(plane) + length) * width) for plane in planes]


def merged(spans: Iterable[Span]) -> list[Span]:
    """`spans` in order, those that touch or overlap made one."""
    out: list[Span] = []
    for start, end in sorted(spans):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(end, out[-1][1]))
        elif start < end:
            out.append((start, end))
    return out


def without(spans: list[Span], holes: list[Span]) -> list[Span]:
    """What of `spans` is in none of `holes`; both as `merged` returns them."""
    out = []
    for start, end in spans:
        for low, high in holes:
            if high <= start or low >= end:
                continue
            if start < low:
                out.append((start, low))
            start = max(start, high)
        if start < end:
            out.append((start, end))
    return out


class Prefixes:
    """Where the first n blocks are in a pool's allocations.

    Bytes that belong to no known tensor stay backed with any n.

    Args:
        tensors: Every tensor of the KV cache, several of one storage included.
        allocations: ``(address, size)`` of each allocation, in bytes.
        total: Blocks of the KV cache.

    Raises:
        RuntimeError: the allocations or a tensor are not what can be mapped in part.
    """

    def __init__(self, tensors: list[torch.Tensor], allocations: list[Span], total: int) -> None:
        for address, size in allocations:
            if address % GRANULE or size % GRANULE:
                raise RuntimeError(f"an allocation of {size} bytes at {address:#x} is not made of granules of 2 MiB")
        self.total = total
        self._tensors, self._allocations = tensors, allocations
        self._whole = self._extents(total)

    def _extents(self, blocks: int) -> list[Span]:
        return merged(span for tensor in self._tensors for span in extent(tensor, blocks, self.total))

    def spans(self, blocks: int) -> list[Span]:
        """What must be mapped for the first `blocks`: whole granules, none of them twice."""
        out, holes = [], without(self._whole, self._extents(blocks))
        for base, size in self._allocations:
            kept = without([(base, base + size)], holes)
            out += merged((a // GRANULE * GRANULE, -(-b // GRANULE) * GRANULE) for a, b in kept)
        return out

    def size(self, blocks: int) -> int:
        """Bytes of `spans`."""
        return sum(end - start for start, end in self.spans(blocks))

    def most(self, room: int) -> int:
        """The largest number of blocks that `room` bytes back."""
        return max(0, bisect.bisect_right(range(self.total + 1), room, key=self.size) - 1)


# ---- memory --------------------------------------------------------------------------------------------------------


def memory(device: torch.device) -> tuple[int, int]:
    """Free and total bytes of the device."""
    free, total = torch.get_device_module(device).mem_get_info(device)
    return int(free), int(total)


def kept_free(engine: Engine, device: int) -> int:
    """Bytes that a partial restore leaves to the engine: what the memory plan counts beside the KV cache and its own.

    The activations of a forward pass and of sampling, because the allocator's cache has just gone back to the device, and
    the plan's margin: a fold's table and what fragments. `device`: its total bytes.
    """
    config = engine.llm.llm_engine.vllm_config
    try:
        planned = PlannedEngine(
            dtype=str(config.model_config.dtype),
            max_num_seqs=config.scheduler_config.max_num_seqs,
            max_num_batched_tokens=config.scheduler_config.max_num_batched_tokens,
        )
        activations = activation_bytes(from_config(config.model_config.hf_config.to_dict()), planned)
    except Exception as error:  # an estimate must not be what a rollout dies of
        logger.debug("rlpatch: the engine's activations cannot be planned: %s", error)
        activations = int(getattr(engine.worker, "peak_activation_memory", 0)) or _ACTIVATIONS  # vLLM's profiling
    return activations + default_margin(device)


class Pieces:
    """What is mapped of a KV cache, or shall be.

    Args:
        handles: One per piece, as the C extension takes them.
        blocks: How many blocks they back, from block 0 on; None: all.
        slots: The memory behind the handles' slots, if it is ours.
        mapper: Maps and unmaps them; None: vLLM's C extension.

    Attributes:
        spans: The addresses.
    """

    def __init__(
        self, handles: list[Handle], blocks: int | None = None, slots: Any = None, mapper: Driver | None = None
    ) -> None:
        self.blocks = blocks
        self.spans = [(handle[2], handle[2] + handle[1]) for handle in handles]
        self._handles, self._slots, self._mapper = handles, slots, mapper
        self._mapped: list[Handle] = []

    @classmethod
    def cut(cls, device: int, spans: Iterable[Span], blocks: int | None = None, mapper: Driver | None = None) -> Pieces:
        """`spans`, whole granules, in pieces with handles of their own."""
        cuts = [(at, min(end, at + PIECE)) for start, end in spans for at in range(start, end, PIECE)]
        slots = [ctypes.c_uint64() for _ in cuts]
        handles = [(device, b - a, a, ctypes.addressof(slot)) for (a, b), slot in zip(cuts, slots, strict=True)]
        return cls(handles, blocks, slots, mapper)

    @classmethod
    def of_pool(cls, allocations: list[Any], *, mapped: bool) -> Pieces:
        """The pool's `allocations`, each with the handle that it has there."""
        pieces = cls([data.handle for data in allocations])
        pieces._mapped = list(pieces._handles) if mapped else []
        return pieces

    def same_handles(self, other: Pieces) -> bool:
        """Whether `other` is for the same memory in the same handles."""
        return self._handles == other._handles

    def map(self) -> None:
        """Map all of them, or nothing.

        Raises:
            RuntimeError: the driver's error.
        """
        from vllm.device_allocator import cumem

        mapper = self._mapper or cumem
        try:
            for handle in self._handles:
                mapper.create_and_map(handle)
                self._mapped.append(handle)
        except BaseException:
            self.unmap()
            raise

    def unmap(self) -> None:
        """Unmap what is mapped; whatever uses it has been waited for."""
        from vllm.device_allocator import cumem

        mapper = self._mapper or cumem
        while self._mapped:
            mapper.unmap_and_release(self._mapped[-1])
            self._mapped.pop()

    def resident_bytes(self) -> int:
        """Bytes mapped now."""
        return sum(handle[1] for handle in self._mapped)


def in_the_pools_handles(pieces: Pieces, allocations: list[Any]) -> Pieces:
    """`pieces` of the pool's `allocations`, mapped again as the pool itself would have done it; what is in them is lost.

    Its own ``sleep`` and ``wake_up`` and its callback for what is freed know one handle per allocation. A KV cache that is
    there in part stays as it is, the pool has no way to map that; so does one whose memory another process has taken from.

    Raises:
        RuntimeError: the driver's error; nothing is mapped then.
    """
    own = Pieces.of_pool(allocations, mapped=False)
    if pieces.blocks is not None or pieces.same_handles(own):
        return pieces
    pieces.unmap()
    try:
        own.map()
    except RuntimeError:
        pieces.map()
        return pieces
    _remember(allocations, own)
    return own


def as_made(allocations: list[Any]) -> Pieces:
    """The pool's `allocations`, mapped as the pool has just done it."""
    pieces = Pieces.of_pool(allocations, mapped=True)
    _remember(allocations, pieces)
    return pieces


def take_out(pieces: Pieces | None, allocations: list[Any]) -> None:
    """Unmap `pieces` of the pool's `allocations`; whatever uses them has been waited for."""
    if pieces is not None:
        pieces.unmap()
    _remember(allocations, None)


def _remember(allocations: list[Any], pieces: Pieces | None) -> None:
    own = pieces is not None and pieces.same_handles(Pieces.of_pool(allocations, mapped=False))
    for data in allocations:
        if own:
            _taken.pop(data.handle[2], None)
        else:
            _taken[data.handle[2]] = pieces


def give_back(handle: Handle) -> None:
    """Before the pool frees the allocation with that handle: map it as the pool believes it to be.

    Raises:
        RuntimeError: the driver's error; there was no room for it.
    """
    from vllm.device_allocator import cumem

    device, _, address, slot = handle
    if address not in _taken:
        return
    pieces = _taken.pop(address)
    if pieces is not None:  # all of them: the whole KV cache ends, and each allocation may need the room of others
        if torch.cuda.is_available():
            torch.cuda.synchronize(device)
        pieces.unmap()
        _taken.update((base, None) for base, other in list(_taken.items()) if other is pieces)
    if isinstance(slot, int):  # ROCm: the pool itself knows that nothing is mapped
        cumem.create_and_map(handle)


def _freed(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    data = instance.pointer_to_data.get(args[0] if args else kwargs["ptr"])
    if data is not None:
        try:
            give_back(data.handle)
        except Exception as error:
            logger.warning(
                "rlpatch: an engine ended while its KV cache was released, and there is no room to map it again (%s): "
                "vLLM's allocator will report an error now, and may report it once more as out of memory when the next "
                "engine is built; LLM.wake_up() before the engine ends avoids that",
                error,
            )
    return wrapped(*args, **kwargs)


def patches() -> list[Patch]:
    """Around the pool's callback for what is freed: an engine may end while its KV cache is out."""
    if on_cpu():
        return []
    from vllm.device_allocator.cumem import CuMemAllocator

    name = next(n for n in ("_python_free_callback", "python_free_callback") if n in vars(CuMemAllocator))
    return [Patch("vllm.device_allocator.cumem", f"CuMemAllocator.{name}", _freed)]


def map_what_fits(engine: Engine, allocations: list[Any]) -> Pieces:
    """Map the KV cache that the pool's `allocations`, all unmapped, are for, or as many of its blocks as fit.

    Raises:
        RuntimeError: there is no room, see `map_prefix`; nothing is mapped then.
    """
    pieces = _map_what_fits(engine, allocations)
    _remember(allocations, pieces)
    return pieces


def _map_what_fits(engine: Engine, allocations: list[Any]) -> Pieces:
    cause: RuntimeError | None = None
    if memory(engine.device)[0] >= size_of(allocations) or _whole_only(engine, allocations) is not None:
        # a KV connector has registered each allocation as one
        if _has_slots(allocations) and not _connected(engine):
            spans = [(data.handle[2], data.handle[2] + data.handle[1]) for data in allocations]
            pieces = Pieces.cut(allocations[0].handle[0], spans, mapper=driver())
        else:
            pieces = Pieces.of_pool(allocations, mapped=False)
        try:
            pieces.map()
        except RuntimeError as error:  # somebody else was faster
            cause = error
        else:
            return pieces
    return map_prefix(engine, allocations, cause)


def size_of(allocations: list[Any]) -> int:
    """Bytes of the pool's `allocations`."""
    return sum(data.handle[1] for data in allocations)


def map_prefix(engine: Engine, allocations: list[Any], cause: BaseException | None = None) -> Pieces:
    """Map as many blocks as there is room for, of a KV cache that consists of the pool's `allocations`, all unmapped.

    What is free is looked up again if another process takes it in between, once.

    Args:
        cause: Why not all of it, if that is an error.

    Raises:
        RuntimeError: not even two blocks; or this KV cache can be mapped as a whole only. Nothing is mapped then.
    """
    needed = f"{size_of(allocations) >> 20} MiB are needed" if cause is None else str(cause)
    why = _whole_only(engine, allocations)
    if why is not None:
        raise RuntimeError(f"{needed}, and it comes back as a whole or not at all, because {why}") from cause
    device = allocations[0].handle[0]
    total = int(engine.core.scheduler.kv_cache_config.num_blocks)
    try:
        prefixes = Prefixes(engine.kv_views(), [(data.handle[2], data.handle[1]) for data in allocations], total)
    except RuntimeError as error:
        raise RuntimeError(f"{needed}, and it comes back as a whole or not at all, because {error}") from cause
    for left in reversed(range(_TRIES)):
        free, size = memory(engine.device)
        kept = kept_free(engine, size)
        blocks = prefixes.most(free - kept)
        if blocks < _LEAST:
            raise RuntimeError(
                f"{needed}, and beside {kept >> 20} MiB kept for the engine's activations and the fold there is room for "
                f"{blocks} of {total} blocks"
            ) from cause
        pieces = Pieces.cut(device, prefixes.spans(blocks), blocks, driver())
        try:
            pieces.map()
        except RuntimeError:
            if not left:
                raise
        else:
            return pieces
    raise AssertionError("unreachable")


def _connected(engine: Engine) -> bool:
    return engine.llm.llm_engine.vllm_config.kv_transfer_config is not None


def _has_slots(allocations: list[Any]) -> bool:
    return all(isinstance(data.handle[3], int) for data in allocations)


def _whole_only(engine: Engine, allocations: list[Any]) -> str | None:
    if not _has_slots(allocations):
        return "this build of vLLM maps in chunks (ROCm)"
    if engine.llm.llm_engine.vllm_config.parallel_config.world_size > 1:
        return "every rank of the engine must have the same blocks"
    if _connected(engine):
        return "a KV connector has registered all of it"
    return None
