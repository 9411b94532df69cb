"""Learn from the engine's own loader where each trainer tensor lands, model by model without model-specific code.

vLLM's loaders end in ``param.data.copy_(loaded_weight)`` on narrowed views of its fused parameters (read in every
release from 0.9.2 to 0.33.0). A dispatch mode sees each of these copies with the geometry of both sides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Geometry:
    """How a tensor lies in its storage: offset, sizes and strides, all in elements."""

    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Geometry:
        """Geometry of a strided tensor."""
        return cls(tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride()))

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for n in self.size:
            count *= n
        return count


@dataclass(frozen=True)
class Piece:
    """One copy made by the loader: `source` (inside the trainer's tensor) went to `target` (inside `storage_of`)."""

    target: Geometry
    source: Geometry
    storage_of: torch.Tensor


def storage_key(tensor: torch.Tensor) -> int:
    """Identity of a tensor's storage."""
    return int(tensor.untyped_storage()._cdata)


class CopyTrace(TorchDispatchMode):
    """Record every ``copy_`` out of `source` while the loader runs; the copies are carried out as well.

    Attributes:
        pieces: Copies whose source is a view of the traced tensor, in order.
        indirect: Number of copies from other memory: the loader computed a new tensor first (a reordering, a cast).
        written: Storages (by `storage_key`) that were written by a copy or a fill.
    """

    def __init__(self, source: torch.Tensor) -> None:
        super().__init__()
        self._source = storage_key(source)
        self.pieces: list[Piece] = []
        self.indirect = 0
        self.written: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            target, source = args[0], args[1]
            self.written.add(storage_key(target))
            if storage_key(source) == self._source:
                laid_out = source.expand(target.shape) if source.shape != target.shape else source
                self.pieces.append(Piece(Geometry.of(target), Geometry.of(laid_out), target))
            else:
                self.indirect += 1
        elif func in (torch.ops.aten.fill_.Scalar, torch.ops.aten.fill_.Tensor, torch.ops.aten.zero_.default):
            self.written.add(storage_key(args[0]))
        return func(*args, **(kwargs or {}))


class WriteGuard(TorchDispatchMode):
    """Let a loader run without writing into the `protected` storages (by `storage_key`)."""

    def __init__(self, protected: set[int]) -> None:
        super().__init__()
        self._protected = protected
        self.written: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name.endswith("_") and args and isinstance(args[0], torch.Tensor):
            key = storage_key(args[0])
            if key in self._protected:
                return args[0]
            self.written.add(key)
        return func(*args, **(kwargs or {}))
