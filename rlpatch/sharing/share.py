"""The trainer's tensors, put into the engine's memory and kept there.

`Sharing` walks the trainer's parameters and persistent buffers once: each is fed to the engine's own loader under a
trace, which fills the engine from the trainer's memory; if the recorded copies make one affine view, the trainer's
tensor becomes that view and its old memory is freed at once, so that loading never holds two full copies for longer
than one tensor takes. The rest is copied on every `sync`, and `report` says what and why.

The trainer's tensors get storages of their own over the engine's memory (through DLPack). Plain views would share one
storage, which transformers, huggingface_hub and safetensors take for tied weights: they would clone the model on the
device to save it, and mis-size the shards; `copy.deepcopy` would copy the engine's whole fused tensor per view.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import dlpack

from rlpatch.errors import SharingError
from rlpatch.sharing.plan import NotAffine, affine_view
from rlpatch.sharing.trace import CopyTrace, Geometry, storage_key

logger = logging.getLogger("rlpatch")

Loader = Callable[[Iterable[tuple[str, torch.Tensor]]], Any]
Renamer = Callable[[str, torch.Tensor], dict[str, torch.Tensor]]


@dataclass
class Slot:
    """One tensor of the trainer: the place where it is registered, under the name the engine's loader knows.

    Attributes:
        name: Name handed to the engine's ``load_weights``.
        module: The module that owns it.
        attribute: Its key in the module's parameters or buffers.
        is_buffer: True for a persistent buffer.
    """

    name: str
    module: nn.Module
    attribute: str
    is_buffer: bool = False

    @property
    def tensor(self) -> torch.Tensor:
        """The tensor registered now (it may have been replaced since)."""
        table: Any = self.module._buffers if self.is_buffer else self.module._parameters
        return table[self.attribute]


@dataclass
class SharedTensor:
    """A slot that lives in the engine's memory.

    Attributes:
        anchor: The engine's tensor (a view that keeps the engine's storage alive).
        geometry: Where in that storage, in elements.
        pointer: Address of the first element; it never changes.
    """

    slot: Slot
    anchor: torch.Tensor
    geometry: Geometry
    pointer: int

    def engine_view(self) -> torch.Tensor:
        """The engine's memory as the trainer shapes it."""
        return self.anchor.as_strided(self.geometry.size, self.geometry.stride, self.geometry.offset)


@dataclass(frozen=True)
class SharingReport:
    """What is shared, what is copied on each sync and why, and what the engine has no place for; sizes in bytes."""

    shared: tuple[str, ...]
    copied: dict[str, str]
    absent: dict[str, str]
    shared_bytes: int
    copied_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "shared": len(self.shared),
            "shared_bytes": self.shared_bytes,
            "copied": dict(self.copied),
            "copied_bytes": self.copied_bytes,
            "absent": dict(self.absent),
        }

    def __str__(self) -> str:
        text = f"{len(self.shared)} of {len(self.shared) + len(self.copied)} tensors shared ({self.shared_bytes >> 20} MiB)"
        if self.copied:
            reasons = sorted(set(self.copied.values()))
            text += f", {len(self.copied)} copied on each sync ({self.copied_bytes >> 20} MiB): {'; '.join(reasons)}"
        return text


def trainer_slots(model: nn.Module, rename: Callable[[str], str | None] = lambda name: name) -> list[Slot]:
    """Every parameter and persistent buffer of the trainer's model, tied ones once, in registration order.

    Args:
        rename: The trainer's name -> the name that the engine's loader knows, or None to leave the tensor out.
    """
    slots, seen = [], set()
    for prefix, module in model.named_modules():
        tables: list[tuple[Any, bool]] = [(module._parameters, False), (module._buffers, True)]
        for table, is_buffer in tables:
            for attribute, tensor in table.items():
                if tensor is None or id(tensor) in seen:
                    continue
                if is_buffer and attribute in module._non_persistent_buffers_set:
                    continue
                name = rename(f"{prefix}.{attribute}" if prefix else attribute)
                if name is None:
                    continue
                seen.add(id(tensor))
                slots.append(Slot(name, module, attribute, is_buffer))
    return slots


def own_storage(view: torch.Tensor) -> torch.Tensor:
    """The same memory behind a storage object of its own, as long as the view (see the module's docstring).

    The result keeps `view`'s storage alive. dtypes that DLPack does not know come back as the plain view.
    """
    try:
        return dlpack.from_dlpack(dlpack.to_dlpack(view.detach()))
    except (BufferError, RuntimeError):
        return view.detach()


class Sharing:
    """Trainer and engine on one copy of the weights.

    Args:
        slots: The trainer's tensors (`trainer_slots`).
        renamer: Maps one (name, tensor) to the checkpoint's names where the engine's loader refuses the trainer's name;
            returned tensors should be views. None: no second try.
        freed: Called with the bytes of each tensor whose old memory `fill` has let go of.
    """

    def __init__(
        self, slots: list[Slot], renamer: Renamer | None = None, freed: Callable[[int], None] | None = None
    ) -> None:
        self.slots = slots
        self.renamer = renamer
        self.freed = freed
        self.shared: list[SharedTensor] = []
        self.copied: dict[str, tuple[Slot, str]] = {}
        self.absent: dict[str, str] = {}
        self.engine_model: nn.Module | None = None
        self.loader: Loader | None = None
        self.parted = False
        self._refused: dict[str, str] = {}
        self.written: set[int] = set()
        self._warned: set[str] = set()

    # ---- joining -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def fill(self, engine_model: nn.Module, loader: Loader) -> None:
        """Fill the engine from the trainer, tensor by tensor, and alias what can be aliased as soon as it is filled.

        Args:
            engine_model: vLLM's module, freshly built; its parameters may hold anything.
            loader: Its ``load_weights``.

        Raises:
            SharingError: the loader refuses a parameter under every name; the trainer's values are intact.
        """
        self.engine_model, self.loader = engine_model, loader
        logger.info("rlpatch: filling the engine from %d tensors of the trainer", len(self.slots))
        for slot in self.slots:
            trace = self._load(slot)
            if trace is None:
                continue
            self.written |= trace.written
            try:
                if trace.indirect:
                    raise NotAffine("the engine's loader rearranges it")
                geometry = affine_view(slot.tensor, trace.pieces)
            except NotAffine as reason:
                if trace.pieces or trace.indirect:
                    self.copied[slot.name] = (slot, str(reason))
                else:
                    self.absent[slot.name] = "the engine has no such tensor"
                continue
            anchor = trace.pieces[0].storage_of
            self._alias(SharedTensor(slot, anchor, geometry, _address(anchor, geometry)))
            if self.freed is not None:
                self.freed(slot.tensor.nbytes)

    def _load(self, slot: Slot) -> CopyTrace | None:
        """Feed one tensor to the engine's loader, under the trainer's name, then under the checkpoint's names."""
        tensor = slot.tensor.detach()
        assert self.loader is not None
        failure: Exception | None = None
        for names in self._namings(slot, tensor):
            trace = CopyTrace(tensor)
            try:
                with trace:
                    loaded = self.loader(names.items())
            except Exception as error:
                failure = failure or error
                continue
            if loaded is not None and not loaded and not trace.pieces and not trace.indirect:
                continue  # skipped by name: another naming may reach it
            return trace
        if failure is None or slot.is_buffer:
            self.absent[slot.name] = "the engine has no such tensor"
            return None
        raise SharingError(
            f"the engine's loader refuses {slot.name} of shape {tuple(tensor.shape)}: {failure}. Check that the model "
            "path's config describes the trainer's model, or apply(share_weights=False)."
        ) from failure

    def _namings(self, slot: Slot, tensor: torch.Tensor) -> Iterator[dict[str, torch.Tensor]]:
        yield {slot.name: tensor}
        if self.renamer is not None:
            renamed = self.renamer(slot.name, tensor)
            if set(renamed) != {slot.name}:
                yield renamed

    def _alias(self, entry: SharedTensor) -> None:
        entry.slot.tensor.data = own_storage(entry.engine_view())
        if entry.slot.tensor.data_ptr() != entry.pointer:
            raise SharingError(
                f"{entry.slot.name}: aliasing gave address {entry.slot.tensor.data_ptr():#x}, not {entry.pointer:#x}"
            )
        self.shared.append(entry)

    # ---- checking ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def verify(self) -> None:
        """After the engine is complete: find each shared tensor in the engine's own parameters, write a pattern through
        the trainer's tensor, read it in the engine, put the old values back.

        A tensor that the engine replaced after loading (repacking), or where the pattern does not arrive, gets memory
        of its own again and is copied on each sync.
        """
        assert self.engine_model is not None
        engine = {storage_key(t): t for t in (*self.engine_model.parameters(), *self.engine_model.buffers())}
        for entry in list(self.shared):
            current = engine.get(storage_key(entry.anchor))
            if current is None:
                self._demote(entry, "the engine replaced it after loading (repacked weights)")
            elif not _pattern_arrives(entry, current):
                self._demote(entry, "a value written by the trainer did not arrive in the engine")

    def _demote(self, entry: SharedTensor, reason: str) -> None:
        entry.slot.tensor.data = entry.slot.tensor.data.clone()
        self.shared.remove(entry)
        self.copied[entry.slot.name] = (entry.slot, reason)

    # ---- living together ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def sync(self) -> int:
        """Bring the engine up to date: nothing for what is shared, a copy for the rest; returns tensors copied.

        A tensor that was moved meanwhile (``model.half()``, a replaced Parameter) is copied into the engine's memory
        and aliased again, with one warning; the engine's addresses never change.

        Raises:
            SharingError: the weights were parted before.
        """
        if self.parted:
            raise SharingError("these weights are no longer shared; call TRL's own sync_weights instead")
        moved = self.rejoin()
        assert self.loader is not None
        for slot, _ in self.copied.values():
            for names in self._namings(slot, slot.tensor.detach()):
                try:
                    self.loader(names.items())
                except Exception as error:
                    failure = error
                    continue
                break
            else:
                raise SharingError(f"the engine's loader refuses {slot.name}: {failure}") from failure
        return moved + len(self.copied)

    def rejoin(self) -> int:
        """The first half of `sync`: what was moved out of the engine's memory; returns the number of these tensors."""
        moved = [e for e in self.shared if e.slot.tensor.data_ptr() != e.pointer]
        for entry in moved:
            self._rejoin(entry)
        return len(moved)

    def _rejoin(self, entry: SharedTensor) -> None:
        tensor, view = entry.slot.tensor, entry.engine_view()
        if tensor.shape != view.shape:
            raise SharingError(
                f"{entry.slot.name} changed its shape from {tuple(view.shape)} to {tuple(tensor.shape)} after sharing"
            )
        view.copy_(tensor.detach())
        bytes_needed = tensor.numel() * tensor.element_size()
        why = None
        if tensor.dtype != view.dtype or tensor.device != view.device:
            why = f"it was moved to {tensor.dtype} on {tensor.device}"
        elif tensor.untyped_storage().nbytes() > bytes_needed:  # whoever keeps that buffer goes on writing to it
            why = "it was moved into a larger buffer by other code"
        if why is not None:
            self.shared.remove(entry)
            self.copied[entry.slot.name] = (entry.slot, why)
            logger.warning("rlpatch: %s is copied on each sync from now on: %s", entry.slot.name, why)
            return
        tensor.data = own_storage(view)
        if "moved" not in self._warned:
            self._warned.add("moved")
            logger.warning(
                "rlpatch: %s was moved out of the engine's memory by other code; it was put back", entry.slot.name
            )

    @torch.no_grad()
    def part(self) -> None:
        """Give the trainer memory of its own again (takes the size of the shared weights). The engine keeps its values."""
        for entry in self.shared:
            if entry.slot.tensor.data_ptr() == entry.pointer:
                entry.slot.tensor.data = entry.slot.tensor.data.clone()
        self.shared.clear()
        self.parted = True

    def report(self) -> SharingReport:
        """What is shared and what is not."""
        size = lambda tensor: tensor.numel() * tensor.element_size()  # noqa: E731
        return SharingReport(
            tuple(entry.slot.name for entry in self.shared),
            {name: reason for name, (_, reason) in self.copied.items()},
            dict(self.absent),
            sum(size(entry.slot.tensor) for entry in self.shared),
            sum(size(slot.tensor) for slot, _ in self.copied.values()),
        )


def _address(anchor: torch.Tensor, geometry: Geometry) -> int:
    return int(anchor.untyped_storage().data_ptr()) + geometry.offset * anchor.element_size()


def _pattern_arrives(entry: SharedTensor, engine: torch.Tensor) -> bool:
    """Write to the first, middle and last element of the trainer's tensor and read the engine's parameter there."""
    trainer, size = entry.slot.tensor.data, entry.geometry.size
    for position in sorted({0, trainer.numel() // 2, trainer.numel() - 1}):
        index, rest = [], position
        for n in reversed(size):
            rest, i = divmod(rest, n)
            index.append(i)
        index.reverse()
        address = entry.geometry.offset + sum(i * s for i, s in zip(index, entry.geometry.stride, strict=True))
        place = _locate(engine, address)
        if place is None:
            return False
        here, there = trainer[tuple(index)], engine.data[place]
        old = here.clone()
        here.copy_(torch.where(old == 0.5, 0.25, 0.5).to(old.dtype))
        arrived = bool(there == here)
        here.copy_(old)
        if not arrived:
            return False
    return True


def _locate(tensor: torch.Tensor, address: int) -> tuple[int, ...] | None:
    """Index of the element of `tensor` at a storage address (elements), or None when it has no such element."""
    rest = address - tensor.storage_offset()
    index = [0] * tensor.dim()
    for k in sorted((k for k, n in enumerate(tensor.shape) if n > 1), key=lambda k: -tensor.stride(k)):
        index[k], rest = divmod(rest, tensor.stride(k))
        if not 0 <= index[k] < tensor.shape[k]:
            return None
    return tuple(index) if rest == 0 else None
