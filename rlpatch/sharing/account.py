"""How many bytes of weights are really resident, told from addresses, and what keeps others from going."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

import torch

_SMALL = 1 << 20  # bytes; torch keeps smaller tensors apart, in segments of 2 MiB


def _ranges(tensors: Iterable[torch.Tensor]) -> list[tuple[int, int]]:
    """Merged [start, end) address ranges of the tensors' storages."""
    spans = sorted(
        {(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in (t.untyped_storage() for t in tensors) if s.nbytes()}
    )
    merged: list[tuple[int, int]] = []
    for start, end in spans:
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def resident_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of memory behind `tensors`, each address counted once."""
    return sum(end - start for start, end in _ranges(tensors))


def resident_twice(trainer: torch.nn.Module, engine: torch.nn.Module) -> int:
    """Bytes of the trainer's parameters that lie outside of the engine's memory while the engine holds them as well.

    Measured from addresses: what the two hold together, minus what either would hold alone if all were one copy. Adapters
    do not count: beside them, the rows with which the engine fills up its vocabulary would look like a second copy.
    """
    mine = [tensor for name, tensor in trainer.named_parameters() if ".lora_" not in name]
    theirs = list(engine.parameters())
    together = resident_bytes([*mine, *theirs])
    return together - max(resident_bytes(mine), resident_bytes(theirs))


@torch.no_grad()
def rehouse(tensors: Iterable[torch.nn.Parameter], room: Callable[[torch.device], None]) -> int:
    """Give `tensors` new places on their device, together; their memory may be what keeps larger blocks from going.

    torch's allocator returns a segment when all of it is free. An adapter made beside the weights lies in what was left of
    their segments, and when the weights go it keeps these (8B, LoRA r=32: 0.6 GiB). Small tensors, and those that share
    their storage with others, stay.

    Args:
        tensors: Parameters that nothing else holds the memory of, e.g. before there is an optimizer.
        room: Gives the allocator's cached blocks back; called while the values are in host memory.

    Returns:
        Bytes moved.

    Raises:
        RuntimeError: the device has no room for them any more; they are in host memory then.
    """
    found = {id(tensor): tensor for tensor in tensors}.values()
    storages = Counter(tensor.untyped_storage().data_ptr() for tensor in found)
    moved = [
        (tensor, tensor.detach().to("cpu", copy=True), tensor.device)
        for tensor in found
        if not tensor.is_meta and tensor.nbytes >= _SMALL and tensor.is_contiguous() and tensor.grad is None
        and storages[tensor.untyped_storage().data_ptr()] == 1 and tensor.untyped_storage().nbytes() == tensor.nbytes
    ]  # fmt: skip
    for tensor, _, _ in moved:
        tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    for device in dict.fromkeys(device for _, _, device in moved):
        room(device)
    try:
        for tensor, values, device in moved:
            tensor.data = values.to(device, copy=True)
    except RuntimeError:  # somebody else took the memory: no value is lost
        for tensor, values, _ in moved:
            if not tensor.numel():
                tensor.data = values
        raise
    return sum(values.nbytes for _, values, _ in moved)
