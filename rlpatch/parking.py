"""Optimizer state in host memory except while the optimizer steps.

Between two steps nothing reads it: neither the rollout, whose KV cache can have the room, nor forward and backward pass,
whose activations can. The price is one copy out and one back per step, at the speed of the host's link (PCIe 5: some 50
GB/s, a fifth of a second for 10 GB).

State is parked by exchanging the tensors' ``data``, so that whoever looks at it in between (a checkpoint, say) finds it
whole, on the CPU. Steps see the very bits that they would without.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

logger = logging.getLogger("rlpatch")

_live: weakref.WeakSet[ParkedState] = weakref.WeakSet()
SMALLEST = 1 << 20  # bytes; smaller tensors stay: step counts, scales, the state of norms
_ALIGNED = 512


def on_accelerator(tensor: torch.Tensor) -> bool:
    """What is worth parking: not what the host has already, and no wrapper around several tensors (torchao, DTensor)."""
    return tensor.device.type not in ("cpu", "meta") and type(tensor) in (torch.Tensor, torch.nn.Parameter)


class ParkedState:
    """The state of one optimizer, parked after every step and fetched before the next.

    Args:
        optimizer: Any ``torch.optim.Optimizer``; its state may come later, and may be loaded from a checkpoint.
        parks: Which tensors of the state (by default those on an accelerator).
        smallest: Smaller ones stay, in bytes.

    Attributes:
        parked_bytes: In host memory right now.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parks: Callable[[torch.Tensor], bool] = on_accelerator,
        smallest: int = SMALLEST,
    ) -> None:
        self.parks, self.smallest = parks, smallest
        self.parked_bytes = 0
        self._optimizer = weakref.ref(optimizer)
        self._arena = torch.empty(0, dtype=torch.uint8)
        self._unpin: Callable[[], Any] = lambda: None
        self._away: list[tuple[torch.Tensor, torch.device]] = []
        self._hooks = [
            optimizer.register_step_pre_hook(lambda *_: self.fetch()),
            optimizer.register_step_post_hook(lambda *_: self.park()),
            optimizer.register_load_state_dict_post_hook(lambda *_: self._loaded()),
        ]
        _live.add(self)

    @torch.no_grad()
    def park(self) -> None:
        """Copy the state to the host and let its device memory go; nothing while it is parked already."""
        optimizer = self._optimizer()
        if optimizer is None or self._away:
            return
        found = [t for t in tensors_in(optimizer.state) if self.smallest <= t.nbytes and self.parks(t) and _alone(t)]
        found = list({id(tensor): tensor for tensor in found}.values())
        places = self._places(found)
        for tensor, place in zip(found, places, strict=True):
            place.copy_(tensor, non_blocking=True)
        for device in {tensor.device for tensor in found if tensor.device.type != "cpu"}:
            torch.get_device_module(device).synchronize(device)
        for tensor, place in zip(found, places, strict=True):
            self._away.append((tensor, tensor.device))
            tensor.data = place
        self.parked_bytes = sum(tensor.nbytes for tensor in found)

    @torch.no_grad()
    def fetch(self) -> None:
        """Bring the state back to where it was.

        Raises:
            torch.OutOfMemoryError: the device has no room for it; what has come back stays there, the rest stays parked.
        """
        optimizer = self._optimizer()
        # some optimizers load a checkpoint's state without calling hooks (bitsandbytes): what was parked is nobody's then
        current = {id(tensor) for tensor in tensors_in(optimizer.state)} if optimizer is not None else set()
        while self._away:
            tensor, device = self._away[-1]
            if id(tensor) in current:
                tensor.data = torch.empty_like(tensor, device=device).copy_(tensor, non_blocking=True)
            self._away.pop()
        self.parked_bytes = 0

    def close(self) -> None:
        """Fetch, and park no more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.fetch()
        self._let_go()

    def _loaded(self) -> None:
        self._away.clear()
        self.park()

    def _let_go(self) -> None:
        self._unpin()
        self._unpin = lambda: None
        self._arena = torch.empty(0, dtype=torch.uint8)

    def _places(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Host memory for each, of its shape, strides and dtype; one allocation for all, kept from step to step."""
        sizes = [-(-tensor.nbytes // _ALIGNED) * _ALIGNED for tensor in tensors]
        if sum(sizes) > self._arena.nbytes:
            self._let_go()  # the old one goes first
            self._arena = torch.empty(sum(sizes), dtype=torch.uint8)
            if any(tensor.device.type == "cuda" for tensor in tensors) and _pin(self._arena):
                # holds the arena: memory goes back to the system after it is no longer page-locked
                self._unpin = weakref.finalize(self, _release, self._arena)
            logger.info("rlpatch: the optimizer's state, %d MiB, waits in host memory between steps", sum(sizes) >> 20)
        places, offset = [], 0
        for tensor, size in zip(tensors, sizes, strict=True):
            flat = self._arena[offset : offset + tensor.nbytes].view(tensor.dtype)
            places.append(flat.as_strided(tensor.shape, tensor.stride()))
            offset += size
        return places


def close_all() -> None:
    """Every optimizer has its state back, and keeps it."""
    for state in list(_live):
        state.close()


def _pin(arena: torch.Tensor) -> bool:
    """Page-lock `arena`, so that copies run at the link's speed; ``pin_memory`` would round up to a power of two."""
    runtime: Any = torch.cuda.cudart()
    failed = int(runtime.cudaHostRegister(arena.data_ptr(), arena.nbytes, 0))
    if failed:
        logger.warning(
            "rlpatch: %d MiB of host memory cannot be page-locked (CUDA error %d): parking the optimizer's state takes "
            "several times as long", arena.nbytes >> 20, failed,
        )  # fmt: skip
    return not failed


def _release(arena: torch.Tensor) -> None:
    runtime: Any = torch.cuda.cudart()
    runtime.cudaHostUnregister(arena.data_ptr())


def _alone(tensor: torch.Tensor) -> bool:
    """Whether nothing else lies in its storage, and it fills that without gaps."""
    return tensor.untyped_storage().nbytes() == tensor.nbytes and torch._debug_has_internal_overlap(tensor) == 0


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Tensors in nested mappings, lists and tuples."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from tensors_in(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from tensors_in(one)
