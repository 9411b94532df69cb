"""Trainer and engine on one copy of weights that bitsandbytes quantized to 4 bits, quantization state included.

A 4-bit weight of ``[N, K]`` is a ``Params4bit``: ``uint8 [N·K/2, 1]`` and a ``quant_state`` with one ``absmax`` per block
of 64 weights. vLLM keeps several of them end to end in one ``uint8 [ΣN·K/2, 1]`` parameter (``qkv_proj``,
``gate_up_proj``) that carries ``bnb_quant_state``, a dict of position → state, and ``bnb_shard_offsets``, where each
begins, in bytes. The bytes go the way of every other tensor (`Sharing.fill` traces them into the engine and aliases
them); this file adds the states. Which trainer weight sits at which position follows from the addresses, so that no name
of any model family occurs here, and nothing is quantized a second time.

Bytes per weight: 1/2 of data, 4/64 of fp32 ``absmax`` (an eighth of the data). Under double quantization the trainer
keeps ``absmax`` in 8 bits (1/64, and 4/64/256 for the second level); vLLM wants it in fp32 and computes that once while
loading. Here the fp32 ``absmax`` is computed once and serves both: the trainer's state becomes a flat one with the very
values that it would compute in each forward pass. Two copies would cost 1/64 more per weight; keeping the nested state in
both would save 3/64, but most releases of bitsandbytes then launch two more kernels per matrix and token. The trainer's
nested state waits in host memory and is put back by `part`.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rlpatch.engine import synchronize
from rlpatch.errors import SharingError
from rlpatch.sharing.account import resident_bytes
from rlpatch.sharing.share import Loader, Renamer, SharedTensor, Sharing, Slot
from rlpatch.sharing.trace import CopyTrace, storage_key

logger = logging.getLogger("rlpatch")

FlatAbsmax = Callable[[Any], torch.Tensor]


def is_quantized(tensor: torch.Tensor) -> bool:
    """Whether this is a 4-bit weight with its quantization state (bitsandbytes' ``Params4bit`` after quantization)."""
    return getattr(tensor, "quant_state", None) is not None


def is_packed(parameter: torch.Tensor) -> bool:
    """Whether this is an engine's 4-bit parameter (vLLM's in-tree one and its plugin's both carry ``pack_factor``)."""
    return parameter.data.dtype == torch.uint8 and hasattr(parameter, "pack_factor")


def has_quantized(model: nn.Module) -> bool:
    """Whether bitsandbytes quantized any weight of `model` to 4 bits."""
    return any(is_quantized(parameter) for parameter in model.parameters())


def refusal(tensors: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """Why these weights cannot be shared in their quantized form, or None. Cheap; nothing is changed.

    Args:
        tensors: The trainer's parameters by name.
    """
    found = False
    for name, tensor in tensors:
        if tensor.dtype == torch.int8 or hasattr(tensor, "SCB"):
            return (
                f"{name} is quantized to 8 bits (load_in_8bit), which vLLM cannot take over; use "
                "BitsAndBytesConfig(load_in_4bit=True)"
            )
        if hasattr(tensor, "quant_storage") and not is_quantized(tensor):
            return f"{name} is not quantized yet; move the model to its device before the trainer is built"
        if not is_quantized(tensor):
            continue
        found = True
        if tensor.dtype != torch.uint8:
            kind = str(tensor.dtype).removeprefix("torch.")
            return (
                f"bnb_4bit_quant_storage={kind!r}, and vLLM's 4-bit weights are uint8; leave it at its default, 'uint8'"
            )
        if getattr(tensor.quant_state, "packing_format_for_cpu", False):
            return f"{name} was repacked for the CPU by a forward pass in eval mode; build the trainer before that"
    return None if found else "none of the trainer's weights is quantized to 4 bits"


def without_engine(reason: str) -> str:
    """The words for a 4-bit trainer whose vLLM has no bitsandbytes.

    Args:
        reason: What is missing, with its remedy (the capability's outcome has it).
    """
    return (
        f"the trainer's model is quantized with bitsandbytes (load_in_4bit), and its engine cannot hold such weights: "
        f"{reason}. Or load the base model in 16 bits, without quantization_config."
    )


@dataclass
class Bound:
    """One 4-bit weight whose state trainer and engine have in common.

    Attributes:
        entry: Its bytes, shared.
        parameter: The engine's parameter that holds them.
        position: Key in that parameter's ``bnb_quant_state``.
        state: The trainer's state as it is while shared (flat).
        absmax: ``float32 [N·K / blocksize]``, the one copy; its address never changes (captured graphs read it).
        nested: The trainer's own nested state with its tensors in host memory, or None when it was flat.
    """

    entry: SharedTensor
    parameter: torch.Tensor
    position: int
    state: Any
    absmax: torch.Tensor
    nested: dict[str, Any] | None


class QuantizedSharing(Sharing):
    """`Sharing` for a model with 4-bit weights.

    Args:
        slots: The trainer's tensors.
        renamer: See `Sharing`.
        flat_absmax: Of a nested state: ``float32 [blocks]``, newly allocated (bitsandbytes' own arithmetic).
    """

    def __init__(self, slots: list[Slot], renamer: Renamer | None, flat_absmax: FlatAbsmax) -> None:
        super().__init__(slots, renamer)
        self.flat_absmax = flat_absmax
        self.bound: list[Bound] = []
        self._unpacked: list[weakref.ref[nn.Module]] = []

    # ---- joining -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def fill(self, engine_model: nn.Module, loader: Loader) -> None:
        """See `Sharing.fill`; 4-bit weights are aliased like the rest. `bind` must follow.

        Raises:
            SharingError: as there, or the weights are quantized in a way that the engine cannot hold.
        """
        reason = refusal((slot.name, slot.tensor) for slot in self.slots)
        if reason is None:
            experts = [n for n, p in engine_model.named_parameters() if is_packed(p) and hasattr(p, "experts_shape")]
            if experts:
                reason = (
                    f"{experts[0]}: transformers leaves fused experts in 16 bits and vLLM wants them in 4; load a model "
                    "with experts without quantization_config"
                )
        if reason is not None:
            raise SharingError(reason)
        for slot in self.slots:
            # On CPUs with AVX512-BF16 bitsandbytes repacks a weight at the first forward pass in eval mode, into memory
            # of its own; that switch is its module's.
            if getattr(slot.module, "support_avx512bf16_for_cpu", False):
                slot.module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
                self._unpacked.append(weakref.ref(slot.module))
        for device in {slot.tensor.device for slot in self.slots}:
            synchronize(device)  # bitsandbytes quantizes on the default stream, vLLM loads on its own
        super().fill(engine_model, loader)

    def _load(self, slot: Slot) -> CopyTrace | None:
        try:
            return super()._load(slot)
        except SharingError as error:
            raise SharingError(
                f"the engine does not take {_described(slot)}. Where trainer and engine quantize different modules "
                "(llm_int8_skip_modules, which vLLM reads from the config.json at name_or_path only), save the quantized "
                "model with save_pretrained and load it from there, or leave that setting out. The engine said: "
                f"{error.__cause__!r}"
            ) from error

    @torch.no_grad()
    def bind(self) -> None:
        """Give the engine's 4-bit parameters the trainer's states. Doing it twice is once.

        Raises:
            SharingError: a parameter of the engine is not covered by the trainer's weights exactly, or one of those
                landed elsewhere; names it and says what to change.
        """
        assert self.engine_model is not None
        for name, (slot, reason) in self.copied.items():
            if is_quantized(slot.tensor):
                raise SharingError(f"{name} is a 4-bit weight that cannot be aliased: {reason}")
        lying: dict[int, list[SharedTensor]] = {}
        for entry in self.shared:
            if is_quantized(entry.slot.tensor):
                lying.setdefault(storage_key(entry.anchor), []).append(entry)
        plan: list[tuple[torch.Tensor, list[SharedTensor]]] = []
        for name, parameter in self.engine_model.named_parameters():
            if not is_packed(parameter):
                continue
            entries = sorted(lying.pop(storage_key(parameter), []), key=lambda entry: entry.geometry.offset)
            if entries:
                _check_tiling(name, parameter, entries)
                plan.append((parameter, entries))
            elif not hasattr(parameter, "bnb_quant_state"):  # what the trainer has not may come from disk
                raise SharingError(
                    f"the engine holds {name} in 4 bits and the trainer does not; llm_int8_skip_modules must be the same "
                    "for both (vLLM reads it from the config.json at name_or_path)"
                )
        if lying:
            strangers = ", ".join(sorted(entry.slot.name for entries in lying.values() for entry in entries))
            raise SharingError(f"the engine does not hold {strangers} in 4 bits")
        known = {id(bound.entry): bound for bound in self.bound}
        for parameter, entries in plan:
            states, offsets = {}, [0]
            for position, entry in enumerate(entries):
                bound = known.get(id(entry)) or self._bind(entry, parameter, position)
                states[position] = copy.copy(bound.state)
                offsets.append(offsets[-1] + entry.slot.tensor.numel())
            parameter.bnb_quant_state = states  # type: ignore[attr-defined]
            with torch.device("cpu"):
                parameter.bnb_shard_offsets = torch.tensor(offsets)  # type: ignore[attr-defined]
        size = self.quantization()
        logger.info(
            "rlpatch: %d 4-bit weights shared: %d MiB of data, %d MiB of absmax",
            size["weights"], size["data_bytes"] >> 20, size["absmax_bytes"] >> 20,
        )  # fmt: skip

    def _bind(self, entry: SharedTensor, parameter: torch.Tensor, position: int) -> Bound:
        state: Any = entry.slot.tensor.quant_state  # type: ignore[attr-defined]
        nested = self._flatten(state)
        bound = Bound(entry, parameter, position, state, state.absmax, nested)
        self.bound.append(bound)
        return bound

    def _flatten(self, state: Any) -> dict[str, Any] | None:
        """Make a nested state flat in place; returns what it was, in host memory, or None."""
        if not state.nested:
            if state.absmax.dtype != torch.float32:
                state.absmax = state.absmax.float()
            return None
        second = copy.copy(state.state2)
        second.absmax, second.code = second.absmax.cpu(), second.code.cpu()
        nested = {"absmax": state.absmax.cpu(), "offset": state.offset.cpu(), "state2": second}
        state.absmax = self.flat_absmax(state)
        state.nested, state.offset, state.state2 = False, None, None
        return nested

    # ---- checking ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def verify(self) -> None:
        """See `Sharing.verify`; besides, each state that the engine reads must be the trainer's.

        Raises:
            SharingError: the engine replaced a state after loading.
        """
        super().verify()
        for bound in self.bound:
            engine = bound.parameter.bnb_quant_state[bound.position]  # type: ignore[attr-defined]
            if engine.nested or engine.absmax.data_ptr() != bound.absmax.data_ptr():
                raise SharingError(f"{bound.entry.slot.name}: the engine replaced its quantization state after loading")

    def quantization(self) -> dict[str, int]:
        """Number of 4-bit weights shared, and bytes: their data, their fp32 absmax, nested states kept on the host."""
        size = lambda tensor: tensor.numel() * tensor.element_size()  # noqa: E731
        host = 0
        for bound in self.bound:
            if bound.nested is not None:
                second = bound.nested["state2"]
                host += size(bound.nested["absmax"]) + size(bound.nested["offset"]) + size(second.absmax)
        return {
            "weights": len(self.bound),
            "data_bytes": sum(size(bound.entry.slot.tensor) for bound in self.bound),
            "absmax_bytes": sum(size(bound.absmax) for bound in self.bound),
            "host_bytes": host,
        }

    # ---- living together ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def sync(self) -> int:
        """See `Sharing.sync`. A weight that was quantized anew meanwhile (PEFT's ``merge_and_unload``) takes its new
        absmax into the shared memory, with one warning.

        Raises:
            SharingError: parted; or a weight is no longer 4-bit, or of another kind of quantization.
        """
        if not self.parted:
            for bound in self.bound:
                self._follow(bound)
        return super().sync()

    def _follow(self, bound: Bound) -> None:
        slot = bound.entry.slot
        state: Any = getattr(slot.tensor, "quant_state", None)
        if state is bound.state and state.absmax is bound.absmax:
            return
        kind = ("shape", "blocksize", "quant_type", "dtype")
        if (
            state is None
            or getattr(state, "packing_format_for_cpu", False)
            or any(getattr(state, field) != getattr(bound.state, field) for field in kind)
        ):
            raise SharingError(
                f"{slot.name} was quantized differently or dequantized after sharing; keep the 4-bit base as it is, or "
                "apply(share_weights=False)"
            )
        if state is not bound.state or state.absmax.data_ptr() != bound.absmax.data_ptr():
            nested = self._flatten(state)
            if state is not bound.state:
                bound.nested = nested
            bound.absmax.copy_(state.absmax)
            if "requantized" not in self._warned:
                self._warned.add("requantized")
                logger.warning(
                    "rlpatch: %s was quantized anew by other code; its state was put into shared memory", slot.name
                )
        state.absmax, bound.state = bound.absmax, state

    @torch.no_grad()
    def part(self) -> None:
        """See `Sharing.part`; the trainer's states become what they were before, in memory of their own."""
        for bound in self.bound:
            state = bound.state
            if state.absmax is not bound.absmax:  # replaced meanwhile: the trainer's own already
                continue
            device = bound.absmax.device
            if bound.nested is None:
                state.absmax = bound.absmax.clone()
                continue
            second = bound.nested["state2"]
            second.absmax, second.code = second.absmax.to(device), second.code.to(device)
            state.absmax, state.offset = bound.nested["absmax"].to(device), bound.nested["offset"].to(device)
            state.state2, state.nested = second, True
        self.bound.clear()
        for reference in self._unpacked:
            module = reference()
            if module is not None:
                module.support_avx512bf16_for_cpu = True  # type: ignore[assignment]
        self._unpacked.clear()
        super().part()


def _described(slot: Slot) -> str:
    tensor = slot.tensor
    kind = "4-bit" if is_quantized(tensor) else str(tensor.dtype).removeprefix("torch.")
    return f"the trainer's {slot.name} ({kind}, shape {tuple(tensor.shape)})"


def _check_tiling(name: str, parameter: torch.Tensor, entries: list[SharedTensor]) -> None:
    """The trainer's weights must lie end to end in the engine's parameter, each on whole blocks of its state."""
    at = parameter.storage_offset()
    for entry in entries:
        tensor = entry.slot.tensor
        if entry.geometry.offset != at or not tensor.is_contiguous():
            raise SharingError(f"{entry.slot.name} does not follow its neighbour in {name} of the engine")
        at += tensor.numel()
    if at != parameter.storage_offset() + parameter.numel():
        raise SharingError(
            f"{name} of the engine has {parameter.numel()} bytes and the trainer's 4-bit weights fill "
            f"{at - parameter.storage_offset()} of them; all parts of a fused weight must be "
            "quantized alike, so leave llm_int8_skip_modules out or name all of them"
        )


def _tensors(states: Iterable[Any]) -> list[torch.Tensor]:
    found = []
    for state in states:
        found += [state.absmax, state.code]
        if state.nested:
            found += [state.offset, state.state2.absmax, state.state2.code]
    return found


def states_twice(trainer: nn.Module, engine: nn.Module) -> int:
    """Bytes of quantization state that trainer and engine hold each for themselves, from addresses."""
    mine = _tensors(p.quant_state for p in trainer.parameters() if is_quantized(p))  # type: ignore[attr-defined]
    theirs: list[torch.Tensor] = []
    for parameter in engine.parameters():
        states = getattr(parameter, "bnb_quant_state", None)
        theirs += _tensors(states.values() if isinstance(states, dict) else [states] if states is not None else [])
    return resident_bytes([*mine, *theirs]) - max(resident_bytes(mine), resident_bytes(theirs))


def data_twice(trainer: nn.Module, engine: nn.Module) -> int:
    """Bytes of the trainer's 4-bit data outside of the engine's memory, from addresses."""
    mine = [p for p in trainer.parameters() if is_quantized(p)]
    theirs = list(engine.parameters())
    return resident_bytes([*mine, *theirs]) - resident_bytes(theirs)
