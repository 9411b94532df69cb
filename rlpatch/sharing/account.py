"""How many bytes of weights are really resident, told from addresses."""

from __future__ import annotations

from collections.abc import Iterable

import torch


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

    Measured from addresses: what the two hold together, minus what either would hold alone if all were one copy.
    """
    mine, theirs = list(trainer.parameters()), list(engine.parameters())
    together = resident_bytes([*mine, *theirs])
    return together - max(resident_bytes(mine), resident_bytes(theirs))
