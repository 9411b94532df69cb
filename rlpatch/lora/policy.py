"""How the trainer's adapters reach the engine: chosen once per pair, put in place around every rollout."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from rlpatch.errors import FoldError, UsageError
from rlpatch.lora.fold import FOLDABLE, ReversibleFold, Work, nothing
from rlpatch.lora.slots import Slots, accepted_rank, rank_of, unfit
from rlpatch.lora.target import Adaptation, in_one_line

logger = logging.getLogger("rlpatch")

FOLD, SLOTS, MERGE = "fold", "slots", "merge"


@dataclass(frozen=True)
class LoraChoice:
    """Which way was taken, and why in one line.

    Attributes:
        mode: ``"fold"``, ``"slots"`` or ``"merge"`` (TRL's own merge, push and unmerge).
        reason: Why this one.
        fell_back: The user or `auto` would have had another.
    """

    mode: str
    reason: str
    fell_back: bool = False


def choose(
    wanted: str, adaptation: Adaptation, *, cannot_share: str | None, cannot_slot: str | None, quantized: bool = False
) -> LoraChoice:
    """Pick the way for one pair before its engine is built.

    Args:
        wanted: The setting, ``"auto"`` or one of the modes.
        adaptation: What the adapters amount to.
        cannot_share: Why the weights cannot be shared, or None. Without one copy there is nothing to fold into.
        cannot_slot: Why vLLM's LoRA slots cannot serve these adapters, or None.
        quantized: The base is quantized: rounding base + delta to 4 bits would lose the adapter.

    Raises:
        UsageError: ``"merge"`` or ``"fold"`` was asked for by name on a quantized base.
    """
    cannot_fold = "the base is quantized" if quantized else _cannot_fold(adaptation, cannot_share)
    if quantized and wanted in (FOLD, MERGE):
        raise UsageError(
            f"lora={wanted!r}: the base is quantized, and rounding base + adapter to few bits would lose the adapter; "
            "use lora='slots', or load the base in 16 bits"
        )
    if wanted == MERGE:
        return LoraChoice(MERGE, "lora='merge': TRL merges, pushes every weight and unmerges")
    if wanted == SLOTS:
        if cannot_slot is None:
            return LoraChoice(SLOTS, "lora='slots'")
        return _merge(f"lora='slots' is not possible ({cannot_slot})", quantized)
    if cannot_fold is None:
        return LoraChoice(FOLD, "exact, no second copy, and rollouts at the speed of merged weights")
    if wanted == FOLD:
        return _merge(f"lora='fold' is not possible ({cannot_fold})", quantized)
    if cannot_slot is None:
        return LoraChoice(SLOTS, f"the fold is not possible ({cannot_fold})", fell_back=True)
    return _merge(f"neither fold ({cannot_fold}) nor slots ({cannot_slot}) are possible", quantized)


def _merge(why: str, quantized: bool) -> LoraChoice:
    if quantized:
        raise UsageError(f"{why}, and a quantized base cannot be merged into; load the base in 16 bits")
    return LoraChoice(MERGE, why, fell_back=True)


def _cannot_fold(adaptation: Adaptation, cannot_share: str | None) -> str | None:
    if adaptation.refused or adaptation.unfoldable:
        return in_one_line({**adaptation.refused, **adaptation.unfoldable})
    if cannot_share is not None:
        return cannot_share
    for target in adaptation.targets:
        if target.weight.dtype not in FOLDABLE:
            return f"{target.name} has dtype {str(target.weight.dtype).removeprefix('torch.')}"
    return None


class Policy(Protocol):
    """Puts the current policy where the engine reads it, and takes it out again."""

    mode: str

    def put(self, meanwhile: Work = nothing) -> None:
        """Before a rollout. Either all of it is in place afterwards, or, after an error, nothing.

        Args:
            meanwhile: Done once by the host before this returns, beside the device's work where that is possible; not
                after an error. What it raises is raised here.
        """

    def take_out(self, meanwhile: Work = nothing) -> None:
        """After a rollout, whatever happened in it; `meanwhile` as in `put`, but done after an error too."""

    def describe(self) -> dict[str, Any]:
        """Plain data for ``status()``."""


class FoldPolicy:
    """The adapters are folded into the shared weights while tokens are generated.

    While they are, ``state_dict()`` of the modules that own these weights still answers with the unfolded base.

    Args:
        read: What the active adapters amount to now.
        recover: See `ReversibleFold`.
    """

    mode = FOLD

    def __init__(
        self, read: Callable[[], Adaptation], recover: Callable[[str], torch.Tensor | None] | None = None
    ) -> None:
        self.read = read
        self.fold = ReversibleFold(recover)
        self._hooks: list[Any] = []

    def put(self, meanwhile: Work = nothing) -> None:
        """See `Policy`.

        Raises:
            FoldError: an adapter that cannot be folded was made active meanwhile, or see `ReversibleFold.fold`.
        """
        self.take_out()  # what an interrupt left in place, if it came while the last rollout was taken out
        adaptation = self.read()
        reasons = {**adaptation.refused, **adaptation.unfoldable}
        if reasons:
            raise FoldError(
                f"the active adapters changed and cannot be folded: {in_one_line(reasons)}; make the old ones active "
                "again, or start with apply(lora='merge')"
            )
        self.fold.fold(adaptation.targets, meanwhile)

    def take_out(self, meanwhile: Work = nothing) -> None:
        """See `Policy`."""
        self.fold.unfold(meanwhile)

    def guard(self, modules: Iterable[nn.Module]) -> None:
        """Let `modules` show the unfolded base to whoever asks for their state in the middle of a rollout."""

        def unfolded(module: nn.Module, state: Any, prefix: str, _: Any) -> None:  # torch marks it: no bound method
            self._unfolded_state(module, state, prefix)

        self._hooks += [module.register_state_dict_post_hook(unfolded) for module in modules]

    def unguard(self) -> None:
        """Take the hooks of `guard` off again."""
        while self._hooks:
            self._hooks.pop().remove()

    def _unfolded_state(self, module: nn.Module, state: Any, prefix: str) -> None:
        if not self.fold.folded:
            return
        for name, parameter in module.named_parameters(recurse=False):
            original = self.fold.original(parameter.detach())
            if original is not None and prefix + name in state:
                state[prefix + name] = original

    def describe(self) -> dict[str, Any]:
        """See `Policy`."""
        return {
            "mode": self.mode,
            "cycles": self.fold.cycles,
            "seconds": dict(self.fold.seconds),
            **self.fold.report.as_dict(),
        }


class SlotPolicy:
    """The adapters are copied into vLLM's LoRA slots before tokens are generated; the base is never written to.

    Args:
        read: What the active adapters amount to now.
        slots: Registered slots.
    """

    mode = SLOTS

    def __init__(self, read: Callable[[], Adaptation], slots: Slots) -> None:
        self.read = read
        self.slots = slots
        self.updates = 0
        self.seconds = 0.0

    @property
    def request(self) -> Any:
        """vLLM's ``LoRARequest`` for every generation."""
        return self.slots.request

    def put(self, meanwhile: Work = nothing) -> None:
        """See `Policy`. Raises UsageError when the active adapters do not fit the slots any more."""
        adaptation = self.read()
        if adaptation.refused:
            raise UsageError(f"the active adapters changed and fit no slots: {in_one_line(adaptation.refused)}")
        start = time.perf_counter()
        self.slots.update(adaptation.targets)
        self.seconds += time.perf_counter() - start
        self.updates += 1
        meanwhile()

    def take_out(self, meanwhile: Work = nothing) -> None:
        """See `Policy`: what is in the slots does not concern the trainer."""
        meanwhile()

    def describe(self) -> dict[str, Any]:
        """See `Policy`."""
        return {"mode": self.mode, "updates": self.updates, "seconds": {"update": self.seconds}}


def cannot_slot(adaptation: Adaptation, accepted: Sequence[int], unshared: Sequence[str]) -> str | None:
    """Why slots cannot serve these adapters, as far as is known before the engine is built, or None.

    Args:
        accepted: Ranks that the engine accepts.
        unshared: Weights that are trained beside the adapters and would not reach the engine.
    """
    if adaptation.refused:
        return in_one_line(adaptation.refused)
    if not adaptation.targets:
        return "no active adapter changes any weight"
    without = {target.name: why for target in adaptation.targets if (why := unfit(target)) is not None}
    if without:
        return in_one_line(without)
    if unshared:
        return f"{unshared[0]} is trained as a whole, and the engine's weights are its own"
    try:
        accepted_rank(rank_of(adaptation.targets), accepted)
    except UsageError as error:
        return str(error)
    return None


def checkpoint_reader(folder: str) -> Callable[[str], torch.Tensor | None]:
    """Reads single weights of a local checkpoint by name; None for what is not there (another name, a hub id)."""

    def read(name: str) -> torch.Tensor | None:
        from safetensors import SafetensorError, safe_open

        path = Path(folder)
        index = path / "model.safetensors.index.json"
        try:
            names: Mapping[str, str] = json.loads(index.read_text())["weight_map"] if index.is_file() else {}
            file = path / names.get(name, "model.safetensors")
            if not file.is_file():
                return None
            with safe_open(file, "pt") as tensors:
                return tensors.get_tensor(name) if name in tensors.keys() else None  # noqa: SIM118 - no mapping
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            logger.warning("rlpatch: %s cannot be read from %s: %s", name, folder, error)
            return None

    return read
