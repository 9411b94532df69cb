"""The cycle of one trainer/engine pair: restore KV and put the policy in place → generate → release KV, policy out.

Both at once where that is possible: the host maps and unmaps memory while the device folds and unfolds adapters.

A `Colocation` is made by a trainer's adapter when it is about to build its engine. It decides whether the pair can
share, carries the trainer's tensors to the loader, and afterwards runs the cycle around every rollout.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from rlpatch.agreement import Agreement
from rlpatch.allocator import expandable
from rlpatch.allocator import refusal as allocator_refusal
from rlpatch.blocks import BlockLimit
from rlpatch.compilation.build import Compilation
from rlpatch.compilation.build import decide as decide_compilation
from rlpatch.compilation.profiles import named
from rlpatch.decoding.attention import launched
from rlpatch.decoding.linear import CHOICES, Shape
from rlpatch.engine import Engine
from rlpatch.errors import StandbyError, UsageError
from rlpatch.lora.fold import Work, nothing
from rlpatch.lora.policy import (
    FOLD,
    MERGE,
    SLOTS,
    FoldPolicy,
    LoraChoice,
    Policy,
    SlotPolicy,
    cannot_slot,
    checkpoint_reader,
    choose,
)  # fmt: skip
from rlpatch.lora.slots import Slots, rank_of
from rlpatch.lora.target import Adaptation, in_one_line
from rlpatch.memory.budget import Budget, Decision, Release, Room
from rlpatch.memory.budget import decide as decide_memory
from rlpatch.memory.engine import CONTEXT
from rlpatch.registry import Context
from rlpatch.sharing.account import rehouse
from rlpatch.sharing.late import Crowded, free_bytes
from rlpatch.sharing.share import Renamer, Sharing, Slot, own_storage, trainer_slots
from rlpatch.standby import KVStandby, make_room

logger = logging.getLogger("rlpatch")

_building: contextvars.ContextVar[Colocation | None] = contextvars.ContextVar("rlpatch_building", default=None)
_ROOM = 1.1  # times the weights: with less free memory the engine takes them tensor by tensor
_live: weakref.WeakSet[Colocation] = weakref.WeakSet()


def building() -> Colocation | None:
    """The pair whose engine is being constructed right now in this thread, if any."""
    return _building.get()


def live() -> list[Colocation]:
    """Pairs whose engine exists, oldest first."""
    return sorted((pair for pair in _live if pair.engine is not None), key=lambda pair: pair.number)


def of_engine(llm: Any) -> Colocation | None:
    """The pair that `llm` (a ``vllm.LLM``) belongs to."""
    return next((pair for pair in live() if pair.engine is not None and pair.engine.llm is llm), None)


def of_executor(executor: Any) -> Colocation | None:
    """The pair whose engine runs on `executor` (vLLM's)."""
    return next(
        (p for p in live() if p.engine is not None and p.engine.llm.llm_engine.model_executor is executor), None
    )


def of_worker(worker: Any) -> Colocation | None:
    """The pair whose engine has `worker` (vLLM's) as its driver."""
    return next((pair for pair in live() if pair.engine is not None and pair.engine.worker is worker), None)


def limit_of(scheduler: Any) -> BlockLimit | None:
    """The limit on the KV blocks of the engine that schedules with `scheduler` (vLLM's), if there is one."""
    limits = (pair.standby.blocks for pair in live() if pair.standby is not None)
    return next((limit for limit in limits if limit is not None and limit.scheduler is scheduler), None)


def of_trainer(model: Any) -> Colocation | None:
    """The pair that was built for `model` before any trainer (see `rlpatch.load`), adapters around it or not."""
    get_base_model = getattr(model, "get_base_model", None)  # a PeftModel's; others have none
    plain = get_base_model() if get_base_model is not None else model
    return next((pair for pair in live() if pair.owner is not None and pair.owner() is plain), None)


def of_parameters(model: Any) -> list[Colocation]:
    """Pairs whose trainer's tensors are parameters of `model`, oldest first."""
    mine = {id(parameter) for parameter in model.parameters()}
    return [pair for pair in live() if any(id(slot.tensor) in mine for slot in pair.slots)]


def part_all() -> list[str]:
    """Part every live pair (see `Colocation.part`); returns a line per pair that could not be parted cleanly."""
    problems = []
    for pair in reversed(live()):
        try:
            pair.part()
        except Exception as error:
            problems.append(f"a live engine could not be parted: {error}")
    return problems


@dataclass(eq=False)
class Colocation:
    """One trainer and its engine.

    Args:
        context: Settings and the providers chosen for these versions.
        slots: The trainer's tensors under the names that the engine's loader knows.
        refusal: Why this pair cannot share weights (from the trainer's side), or None.
        renamer: See `rlpatch.sharing.share.Sharing`.
        standby_refusal: Why its KV cache is not released between rollouts, or None.
        upstream_sleep: The user asked for the trainer's own sleep mode.
        on_joined: Called when the engine is complete and it is known what is shared.
        on_discarded: Called when upstream's sleep mode has thrown the engine's own weights away (level 2).
        owner: The model of a pair that exists before its trainer does; its adapters may come later (`follow`).
        slots_rank: LoRA slots of this rank are reserved in the engine for adapters that come later; 0: none.
        budget: What the memory plan is made from, or why there is none; None: nobody knows the trainer.
        sampling: What the trainer's rollouts sample with, as far as it is known before the engine is built: fields of
            vLLM's ``SamplingParams``.

    Attributes:
        adapters: Reads the trainer's adapters (``providers["lora"]`` of its model), or None when it has none.
        lora: How they reach the engine.
        policy: Puts them in place around each rollout; None without adapters, and where TRL merges.
        agreement: How far trainer and rollouts differ in their log-probs.
        compilation: The compile settings of its engine, or None when vLLM was left alone.
        replaced: Tensors whose trained copy (``modules_to_save``) has taken the original's place in the engine.
        memory: What became of the memory plan; None before the engine is built.
        unexpanded: Why torch's allocator runs without expandable segments (see `rlpatch.allocator`), or None.
        skinny: What its decode steps' linear layers were timed for (`rlpatch.decoding.linear`); None: they were not.
    """

    context: Context
    slots: list[Slot]
    refusal: str | None = None
    renamer: Renamer | None = None
    standby_refusal: str | None = None
    upstream_sleep: bool = False
    on_joined: Callable[[Colocation], None] | None = None
    on_discarded: Callable[[], None] | None = None
    owner: weakref.ref[Any] | None = None
    slots_rank: int = 0
    budget: Budget | str | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    engine: Engine | None = None
    sharing: Sharing | None = None
    adapters: Any = None
    lora: LoraChoice | None = None
    policy: Policy | None = None
    standby: KVStandby | None = None
    seconds: dict[str, float] = field(default_factory=lambda: {"sync": 0.0})
    agreement: Agreement = field(default_factory=Agreement)
    replaced: tuple[str, ...] = ()
    memory: Decision | None = None
    number: int = 0
    unexpanded: str | None = None
    compilation: Compilation | None = None
    skinny: list[tuple[Shape, int]] | None = None
    _rolling: bool = False
    _instead: Adaptation | None = None
    _guest_fold: FoldPolicy | None = None
    _lora_slots: Slots | None = None
    _structure: tuple[int, ...] = ()
    _crowded: Crowded | None = None

    def __post_init__(self) -> None:
        self.number = 1 + max((pair.number for pair in _live), default=0)
        if not self.context.share_weights:
            self.refusal = "share_weights is off"
        elif "share_weights" not in self.context.providers:
            why = self.context.reasons.get("share_weights")
            self.refusal = self.refusal or why or "no adapter shares weights with this vLLM"
        if not self.context.standby:
            self.standby_refusal = "standby is off"
        elif "standby" not in self.context.providers:
            why = self.context.reasons.get("standby")
            self.standby_refusal = self.standby_refusal or why or "no adapter brings standby to this vLLM"

    @property
    def shares(self) -> bool:
        """Whether trainer and engine hold (at least part of) the weights in common."""
        return self.sharing is not None and bool(self.sharing.shared)

    @property
    def shares_planned(self) -> bool:
        """Whether the engine under construction shall be filled from the trainer's memory."""
        return self.refusal is None

    @property
    def upstream_sleep_stays(self) -> bool:
        """Whether the trainer's own sleep mode remains in charge: asked for, and the weights are the engine's alone.

        Never with LoRA slots: level 2 discards their memory, and vLLM goes on believing that the adapter lies in it.
        """
        asked = self.upstream_sleep and self.engine is not None and self.engine.sleep_mode
        return asked and not self.shares and self.standby is None and not isinstance(self.policy, SlotPolicy)

    @property
    def wants_standby(self) -> bool:
        """Whether the KV cache shall be released between rollouts."""
        return self.standby_refusal is None

    @property
    def lora_request(self) -> Any:
        """What every generation must carry for the engine to use the adapters' slots, or None."""
        if self._instead is None:
            return self.policy.request if isinstance(self.policy, SlotPolicy) else None
        return self._lora_slots.request if self._lora_slots is not None and self._instead.targets else None

    @property
    def pushes(self) -> bool:
        """Whether `sync` is what brings the policy to the engine; else TRL's own push does."""
        return self.shares or self.policy is not None

    # ---- adapters ----------------------------------------------------------------------------------------------

    def adapt(self, model: Any, *, quantized: bool = False) -> None:
        """Decide how the adapters of `model` reach the engine; before it is built, or for one that shares already.

        Raises:
            UsageError: a setting asks for what would lose the adapters (see `rlpatch.lora.policy.choose`).
        """
        self.adapters, self.lora = self._choose(model, quantized)
        if self.lora.mode == MERGE:
            self.refusal = self.refusal or _merged(self.lora)
        _say(self.lora)

    def _choose(self, model: Any, quantized: bool) -> tuple[Any, LoraChoice]:
        """The reader of the adapters of `model` (None: nothing reads them), and the way that they go."""
        reader = self.context.providers.get("lora")
        if reader is None:
            why = self.context.reasons.get("lora", "")
            return None, LoraChoice(MERGE, f"no adapter reads this PEFT {why}".strip(), fell_back=True)
        adapters = reader(model)
        adaptation = adapters.read()
        return adapters, choose(
            self.context.lora,
            adaptation,
            cannot_share=None if self.shares else self.refusal,
            cannot_slot=self._cannot_slot(adaptation),
            quantized=quantized,
        )

    def follow(self, model: Any, *, quantized: bool = False, may_part: bool = False) -> None:
        """`adapt` for a pair whose engine exists and shares: adapters were added to `model`, changed or taken off.

        The way is chosen anew only when the model does not consist of the same modules as at the last call.

        Args:
            model: The pair's owner, in which ``get_peft_model`` works in place.
            may_part: Where neither fold nor slots can serve the adapters, give the trainer weights of its own again and
                leave them to its merge and push; else that is an error.

        Raises:
            UsageError: the adapters cannot reach the engine; the pair is as it was.
        """
        if self.sharing is None or self.engine is None:
            return
        structure = tuple(id(module) for module in model.modules())
        if structure == self._structure:
            if self.adapters is not None:  # modules_to_save are switched on and off with their adapter
                self._repoint(trainer_slots(model, self.adapters.names().get))
            return
        reader = self.context.providers.get("lora")
        adapters, choice = None, None
        if reader is None and getattr(model, "peft_config", None):
            adapters, choice = self._choose(model, quantized)
        elif reader is not None and reader.adapted(model):
            adapters = reader(model)
            adaptation = adapters.read()
            lost = [target.parameter for target in adaptation.targets if target.parameter in self.sharing.absent]
            if self.engine.lora_slots and not adaptation.targets and not adaptation.refused:
                structure = ()  # the adapters are switched off just now: look again next time
            elif lost:
                choice = LoraChoice(MERGE, f"they change {lost[0]}, and the engine has no such tensor", fell_back=True)
            else:
                adapters, choice = self._choose(model, quantized)
        if choice is not None and choice.mode == MERGE:
            if not may_part:
                raise UsageError(
                    f"the adapters of this model cannot reach the engine that shares its weights: {choice.reason}. Use "
                    "adapters that are plain LoRA, or apply(lora='slots') before rlpatch.load where only the fold cannot "
                    "serve them; a TRL trainer can train them all the same, with a second copy of the weights"
                )
            self._withdraw()
            self.adapters, self.lora = adapters, choice
            self.refuse(_merged(choice))
            _say(choice)
            return
        before = self.adapters, self.lora, self.policy
        self.adapters, self.lora, self.policy = adapters, choice, None
        try:
            if choice is not None:
                self._place_adapters()
        except BaseException:
            self.adapters, self.lora, self.policy = before
            raise
        if isinstance(before[2], FoldPolicy):
            before[2].unguard()
        self._structure = structure
        if adapters is not None:
            self._repoint(trainer_slots(model, adapters.names().get))
        else:
            self._repoint(trainer_slots(model))
            self.replaced = ()  # whatever it has now is the base
        if choice is not None:
            _say(choice)

    def _withdraw(self) -> None:
        """Let go of the policies: their hooks on the trainer's modules, their adapter in the engine."""
        for policy in (self.policy, self._guest_fold):
            if isinstance(policy, FoldPolicy):
                policy.take_out()
                policy.unguard()
        if self._lora_slots is not None:
            self._lora_slots.remove()
        self.policy = self._guest_fold = self._lora_slots = None

    @torch.no_grad()
    def _repoint(self, current: list[Slot]) -> None:
        """Tensors that the model uses now in place of those that it had (``modules_to_save``) take their places.

        One that is no longer used gets memory of its own, with the values that it had.
        """
        assert self.sharing is not None
        now = {slot.name: slot for slot in current}
        for slot in self.slots:
            new, old = now.get(slot.name), slot.tensor
            if new is None or new.tensor is old:
                continue
            entry = next((entry for entry in self.sharing.shared if entry.slot is slot), None)
            slot.module, slot.attribute = new.module, new.attribute
            if entry is not None:
                old.data = old.data.clone()
                view, tensor = entry.engine_view(), slot.tensor
                view.copy_(tensor.detach())
                if (tensor.dtype, tensor.device) == (view.dtype, view.device):
                    tensor.data = own_storage(view)
                else:
                    self.sharing.shared.remove(entry)
                    self.sharing.copied[slot.name] = (slot, f"its copy is trained in {tensor.dtype} on {tensor.device}")
            if slot.name in self.replaced:
                self.replaced = tuple(name for name in self.replaced if name != slot.name)
            else:
                self.replaced = (*self.replaced, slot.name)

    def _cannot_slot(self, adaptation: Adaptation) -> str | None:
        provider = self.context.providers.get("lora_slots")
        if provider is None:
            return self.context.reasons.get("lora_slots") or "no adapter reaches the LoRA slots of this vLLM"
        if self.engine is not None and not self.engine.lora_slots:
            return "the engine was built without them"
        trained = [slot.name for slot in self.slots if slot.tensor.requires_grad]
        return cannot_slot(adaptation, provider.accepted_ranks(), trained if self.refusal is not None else [])

    def engine_arguments(self) -> dict[str, Any]:
        """Arguments of ``LLM`` that this pair's engine needs beside the trainer's own."""
        found: dict[str, Any] = {}
        if self.shares_planned:
            found.update(self.context.providers["share_weights"].engine_arguments(self))
        rank = self.slots_rank
        if self.lora is not None and self.lora.mode == SLOTS:
            rank = rank_of(self.adapters.read().targets)
        if rank:
            found.update(self.context.providers["lora_slots"].engine_arguments(rank))
        return found

    def plan_memory(self, arguments: Mapping[str, Any], release: Release) -> Mapping[str, Any]:
        """Arguments of ``LLM`` that the memory plan decides, given all others; nothing where it is not in force.

        Raises:
            UsageError: the plan does not fit (see `rlpatch.memory.budget.decide`).
        """
        try:
            self.memory = self._decide(arguments, release)
        except UsageError:
            raise
        except Exception as error:  # the engine can do without a plan
            reason = f"it failed: {error!r}"
            self.memory = Decision(False, reason, warnings=(f"memory plan: not applied: {reason}",))
        if self.memory.expanded and self.unexpanded is not None:
            self._expand()
        elif self.memory.plan is not None and self.unexpanded is not None and self._expanding() == "auto":
            self.unexpanded = "the memory plan does not need them"
        for text in self.memory.warnings:
            logger.warning("rlpatch: %s", text)
        logger.info("rlpatch: %s", self.memory)
        return self.memory.arguments

    def _decide(self, arguments: Mapping[str, Any], release: Release) -> Decision:
        if not isinstance(self.budget, Budget):
            early = "rlpatch.load builds the engine before its trainer is known" if self.owner is not None else None
            return Decision(False, self.budget or early or self.context.reasons.get("memory_plan") or "switched off")
        if not self.wants_standby:
            return Decision(False, f"the KV cache stays resident: {self.standby_refusal}")
        if not self.shares_planned:
            return Decision(False, f"the weights are not shared: {self.refusal}")
        room = _room(self.budget, next(slot.tensor.device for slot in self.slots), self.context.memory_limit)
        if room is None:
            return Decision(False, "no device memory to plan on the CPU (apply(memory_plan='8GiB') gives it a size)")
        parks = self.context.providers.get("park_optimizer")
        parking = self.context.park_optimizer if parks is not None and parks(self.budget.trainer) else False
        left_out = self.context.providers.get("lora_casts")
        casts = left_out is None or not left_out(self.budget.model)
        saving = self.budget.saving and "saved_activations" in self.context.providers
        budget = replace(self.budget, parking=parking, expanding=self._expanding(), input_casts=casts, saving=saving)
        return decide_memory(budget, arguments, room, release)

    def _expanding(self) -> bool | str:
        """Whether torch's allocator expands its segments, or may."""
        there = "expandable_segments" in self.context.providers and allocator_refusal() is None
        return self.context.expandable_segments if there else False

    def _expand(self) -> None:
        self.unexpanded = self.context.providers["expandable_segments"]()
        if self.unexpanded is not None:
            logger.warning("rlpatch: torch's allocator does not expand its segments: %s", self.unexpanded)

    def _place_adapters(self) -> None:
        """The engine is complete: make the policy, or leave the adapters to TRL after all."""
        assert self.engine is not None and self.lora is not None
        if self.lora.mode == SLOTS:
            slots = self._slots_for(self.adapters.read())
            refused = slots.refusals()
            if refused:
                raise UsageError(
                    f"the engine's LoRA slots cannot serve {in_one_line(refused)}; apply(lora='fold') or "
                    "apply(lora='merge'), or leave these layers out of LoraConfig.target_modules"
                )
            slots.register()
            self._lora_slots = slots
            self.policy = SlotPolicy(self.adapters.read, slots)
        if self.lora.mode == FOLD and self.sharing is None:
            self.lora = LoraChoice(MERGE, f"the weights are not shared ({self.refusal})", fell_back=True)
            logger.warning("rlpatch: LoRA by %s: %s", self.lora.mode, self.lora.reason)
        if self.lora.mode == FOLD:
            assert self.sharing is not None
            path = str(getattr(self.adapters.model, "name_or_path", "") or "")
            self.policy = self._fold_of(self.adapters.read, checkpoint_reader(path) if path else None)

    def _fold_of(
        self, read: Callable[[], Adaptation], recover: Callable[[str], torch.Tensor | None] | None = None
    ) -> FoldPolicy:
        assert self.sharing is not None
        policy = FoldPolicy(read, recover)
        policy.guard(dict.fromkeys(entry.slot.module for entry in self.sharing.shared))
        return policy

    def _slots_for(self, adaptation: Adaptation) -> Slots:
        """This engine's slots (one adapter at a time lies in them), about to be registered for `adaptation`."""
        assert self.engine is not None
        targets = tuple(target for target in adaptation.targets if target.products)
        if self._lora_slots is None:
            return Slots(self.engine, self.context.providers["lora_slots"](self.engine), targets)
        self._lora_slots.targets = targets
        return self._lora_slots

    def _guest(self, adaptation: Adaptation) -> Policy | None:
        """What puts `adaptation` in place for one rollout; None for the base."""
        assert self.engine is not None
        if not adaptation.targets:
            return None
        if self.engine.lora_slots:
            if self._lora_slots is None:
                slots = self._slots_for(adaptation)
                slots.register()
                self._lora_slots = slots
            return SlotPolicy(lambda: adaptation, self._lora_slots)
        if self._guest_fold is None:
            self._guest_fold = self._fold_of(lambda: self._instead or Adaptation(()))
        return self._guest_fold

    def _trains(self, name: str) -> bool:
        """Whether adapters change the tensor of that name, or train a copy of it."""
        slot = next((slot for slot in self.slots if slot.name == name), None)
        trained = slot is not None and bool(slot.tensor.requires_grad)
        return trained or any(name == target.parameter for target in self.adapters.read().targets)

    # ---- building ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def build(self) -> Iterator[None]:
        """Around the engine's construction: the loader and the constructor's adapter find this pair through `building`."""
        self.unexpanded = self.context.reasons.get("expandable_segments") or "switched off"
        if "expandable_segments" in self.context.providers:
            self.unexpanded = None if expandable() else "no memory plan asks for them"
            if self.context.expandable_segments is True:
                self._expand()
        token = _building.set(self)
        try:
            yield
        except BaseException:
            self.abandon()
            raise
        finally:
            _building.reset(token)

    @contextlib.contextmanager
    def constructing(
        self, outside: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    ) -> Iterator[Crowded | None]:
        """Around the construction and filling of the engine's model; see `rlpatch.sharing.late` for crowded devices.

        Args:
            outside: A context in which the engine's memory pool is not in use.
        """
        tensors = [slot.tensor for slot in self.slots]
        if self.refusal is not None or not tensors:
            yield None
            return
        device, needed = tensors[0].device, sum(tensor.nbytes for tensor in tensors)
        free = free_bytes(device)
        if free > _ROOM * needed:
            yield None
            return
        logger.info(
            "rlpatch: the weights (%d MiB) do not fit twice (%d MiB are free): the engine takes them tensor by tensor",
            needed >> 20, free >> 20,
        )  # fmt: skip
        with Crowded(device, outside) as crowded:
            self._crowded = crowded
            try:
                yield crowded
            finally:
                self._crowded = None

    @contextlib.contextmanager
    def compiling(self, arguments: dict[str, Any]) -> Iterator[None]:
        """Around the engine's constructor, whose `arguments` get what the compile settings change.

        Raises:
            UsageError: the given ``compilation_config`` has an unknown field (see `rlpatch.compilation.build.decide`).
        """
        dialect = self.context.providers.get("compile")
        if dialect is None:
            yield
            return
        name = self.context.compile
        self.compilation = decide_compilation(name, named(name, "compile"), dialect, arguments)
        arguments.update(self.compilation.arguments)
        with self.compilation.in_force():
            yield

    def loading(self) -> Sharing | None:
        """Called by the loader: the `Sharing` to fill the engine with, or None to load as usual."""
        if self.refusal is not None:
            return None
        self.sharing = Sharing(self.slots, self.renamer, self._crowded.freed if self._crowded is not None else None)
        return self.sharing

    def refuse(self, reason: str) -> None:
        """Called by the loader: this pair cannot share after all. The trainer gets its own memory back."""
        if self.sharing is not None:
            self.sharing.part()
            self.sharing = None
        self.refusal = reason

    def joined(self, llm: Any) -> None:
        """Called when the engine is complete: verify what is shared, say so once, release the KV cache."""
        self.engine = Engine(llm)
        _live.add(self)
        if self.compilation is not None:
            self.compilation.settled(llm.llm_engine.vllm_config.compilation_config)
        if self.sharing is not None:
            self.sharing.verify()
            if not self.sharing.shared:
                reasons = sorted(set(self.sharing.report().copied.values()))
                self.refuse("; ".join(reasons) or "the engine has none of the trainer's tensors")
        if self.sharing is not None and self.lora is not None:
            lost = [name for name, why in self.sharing.absent.items() if self._trains(name)]
            if lost:
                self.refuse(f"adapters change {', '.join(lost)}, and the engine has no such tensor")
        if self.sharing is not None and self.adapters is not None and self.engine.device.type != "cpu":
            shared = {entry.slot.tensor.data_ptr() for entry in self.sharing.shared}
            trained = (p for p in self.adapters.model.parameters() if p.requires_grad)
            rehouse((p for p in trained if p.data_ptr() not in shared), make_room)
        if self.lora is not None:
            self._place_adapters()
        if self.sharing is not None:
            logger.info("rlpatch: %s", self.sharing.report())
            for name, reason in self.sharing.report().copied.items():
                logger.info("rlpatch: %s is copied on each sync: %s", name, reason)
        elif self.context.share_weights:
            logger.warning("rlpatch: weights are not shared (%s); TRL's own weight sync is used", self.refusal)
        # Unshared weights that the user wants asleep are released by upstream's own sleep mode, KV included.
        if self.upstream_sleep_stays:
            self.standby_refusal = "the trainer's own sleep mode is on"
        if self.wants_standby:
            try:
                self.standby = KVStandby(self.engine, self.context.providers["standby"](self.engine))
                self.standby.release()
            except StandbyError as error:
                self.standby, self.standby_refusal = None, str(error)
                logger.warning("rlpatch: the KV cache stays resident: %s", error)
        if self.upstream_sleep and not self.upstream_sleep_stays:
            instead = "became KV standby" if self.standby is not None else "stays off"
            why = "its weights are shared or stay resident"
            if isinstance(self.policy, SlotPolicy):
                why = "level 2 would discard the LoRA slots"
            logger.info("rlpatch: the trainer's sleep mode %s: %s", instead, why)
        if self.on_joined is not None:
            self.on_joined(self)

    def abandon(self) -> None:
        """The engine's construction failed: the trainer keeps its values, in memory of its own if there is enough."""
        if self.sharing is not None:
            try:
                self.sharing.part()
            except (RuntimeError, MemoryError) as error:  # still right, but it keeps the dead engine's weights alive
                logger.warning("rlpatch: the trainer keeps its weights in the failed engine's memory: %s", error)
            self.sharing = None
        self.engine = self.standby = None
        _live.discard(self)

    # ---- the cycle ---------------------------------------------------------------------------------------------

    def sync(self) -> None:
        """Put the trainer's current policy in place; with everything shared this forgets cached prefixes and no more."""
        assert self.engine is not None
        if self.sharing is not None and (self.lora is None or self.lora.mode != FOLD):
            self.sharing.sync()  # a folded policy's copies are made when it is folded
        self._forget_prefixes()

    def _forget_prefixes(self) -> None:
        """Unless that happened when the KV cache went: vLLM goes through all of its blocks (0.7 ms for 18,000)."""
        assert self.engine is not None
        if self.standby is None or not self.standby.released:
            self.engine.llm.reset_prefix_cache()

    @contextlib.contextmanager
    def rollout(self, instead: Adaptation | None = None) -> Iterator[None]:
        """Around generation: policy and KV cache are in place inside, and out again afterwards, whatever happens inside.

        Args:
            instead: This adaptation of the base takes the place of the active adapters for once; one without targets is
                the base itself.

        Raises:
            UsageError: `instead` is asked for inside of a rollout, whose policy is in place.
        """
        if self._rolling:  # the engine's generate inside of the trainer's
            if instead is not None:
                raise UsageError(
                    "fast_generate(lora=…) was called inside of another rollout, whose policy is in place; call it when "
                    "that has ended"
                )
            yield
            return
        self._rolling, self._instead = True, instead
        quiet = self.context.providers.get("rollout_gc", contextlib.nullcontext)
        try:
            with quiet(), self._in_place():
                yield
        finally:
            self._rolling, self._instead = False, None
            if instead is not None and self.engine is not None:
                self.engine.llm.reset_prefix_cache()  # the active policy's next rollout may come without a sync

    @contextlib.contextmanager
    def _in_place(self) -> Iterator[None]:
        for left in (self.policy, self._guest_fold):  # by an interrupt, if it came while they were taken out
            if left is not None:
                left.take_out()
        policy = self.policy if self._instead is None else self._guest(self._instead)
        standby = self.standby
        try:
            self._put(policy)
            yield
        except BaseException as error:
            try:
                self._take_out(policy, standby)
            except Exception as second:  # the first error is the one to show
                logger.warning("rlpatch: after %r the rollout was not cleared away: %s", error, second)
            raise
        else:
            self._take_out(policy, standby)

    def _put(self, policy: Policy | None) -> None:
        """`policy` and the KV cache, in place."""
        restore: Work = nothing
        if self.standby is not None and self.standby.released:
            restore = self.standby.restore
        if policy is None and self._instead is None:
            restore()
            return
        assert self.engine is not None
        self._forget_prefixes()
        if self.sharing is not None:
            self.sharing.rejoin()  # never while folded: what is copied then would stay folded
        if restore is not nothing:
            make_room(self.engine.device)  # before the device has something to do, which this would wait for
        if policy is not None:
            policy.put(restore)
        else:
            restore()
        folds = self._guest_fold is not None or (self.lora is not None and self.lora.mode == FOLD)
        if self.sharing is not None and self.sharing.copied and folds:
            self.sharing.sync()

    def _take_out(self, policy: Policy | None, standby: KVStandby | None) -> None:
        """The inverse, also of half of it. The policy is taken out even if the KV cache cannot be released."""
        release: Work = nothing
        try:
            # else another standby, or none: the pair was parted meanwhile
            if standby is not None and self.standby is standby and not standby.released:
                standby.rest()
                release = functools.partial(standby.release, at_rest=True)
        finally:
            if policy is not None:
                policy.take_out(release)
            else:
                release()

    def sleep(self) -> None:
        """What ``LLM.sleep(level ≥ 1)`` means for this pair: the weights are the trainer's too, so only KV goes."""
        if self.standby is None:
            raise StandbyError(
                f"this engine shares its weights with the trainer and cannot sleep ({self.standby_refusal}); "
                "apply(standby=True), or apply(share_weights=False) to let vLLM's sleep mode have its own copy"
            )
        if not self.standby.released:
            self.standby.release()

    def forget_slots(self) -> None:
        """The engine is about to discard the memory of its LoRA slots: the next rollout registers the adapter anew."""
        if self._lora_slots is not None:
            self._lora_slots.remove()

    def wake(self) -> None:
        """What ``LLM.wake_up`` means for this pair."""
        if self.standby is not None and self.standby.released:
            self.standby.restore()

    # ---- watching ----------------------------------------------------------------------------------------------

    def observe(self, difference: float) -> None:
        """Take in how far the trainer's log-probs of one batch of rollouts are from the engine's: a mean absolute
        difference, in nats. Warns once, when they part."""
        if self.agreement.add(difference):
            logger.warning(
                "rlpatch: the rollouts' log-probs have parted from the trainer's: %.2g nats per token on average, where "
                "the first steps had %.2g. Likely cause: %s",
                difference,
                self.agreement.level,
                self._why_parted(),
            )

    def _why_parted(self) -> str:
        if self.upstream_sleep_stays:
            return (
                f"the weights are not shared ({self.refusal}), and TRL's sleep mode brings back others than the policy's; "
                "leave vllm_enable_sleep_mode off"
            )
        if not self.shares and self.policy is None:
            return (
                f"the weights are not shared ({self.refusal}), and TRL's push is skipped or does not reach the engine"
            )
        if self.sharing is not None and self.sharing.copied:
            names = ", ".join(sorted(self.sharing.copied)[:3])
            return f"these tensors are not shared but copied on each sync: {names}; code that skips sync leaves them behind"
        if self.lora is not None:
            return f"the adapters reach the engine by {self.lora.mode}; code that changes them in between may evade it"
        assert self.engine is not None
        dtypes = sorted({str(slot.tensor.dtype).removeprefix("torch.") for slot in self.slots})
        return (
            "not old weights, for they are shared: trainer and engine compute differently (weights in "
            f"{', '.join(dtypes)}; autocast, attention kernels, expert routing, dropout, temperature)"
        )

    # ---- parting -----------------------------------------------------------------------------------------------

    def part(self) -> None:
        """Make the pair ordinary again: KV restored, the trainer's weights in memory of their own."""
        try:
            if self.standby is not None and self.standby.released:
                self.standby.restore()
            if self.standby is not None:
                self.standby.hand_over()
            blocks = self.standby.blocks if self.standby is not None else None
            if blocks is not None and blocks.usable < blocks.total:
                logger.warning(
                    "rlpatch: the engine stays with the %d of %d KV blocks that the device has room for, and its own sleep "
                    "mode does not know that", blocks.usable, blocks.total,
                )  # fmt: skip
        finally:
            self._withdraw()
            if self.sharing is not None:
                self.sharing.part()
            self.standby = None
            if self.on_joined is not None:
                self.on_joined(self)  # the trainer's own sleep mode may take over again
            _live.discard(self)

    def describe(self) -> dict[str, Any]:
        """Plain data for ``status()``: sharing, KV bytes resident now, seconds in sync and standby."""
        sharing = self.sharing.report() if self.sharing is not None else None
        return {
            "sharing": sharing.as_dict() if sharing is not None else None,
            "not shared": self.refusal,
            "lora": None if self.lora is None else {
                "mode": self.lora.mode,
                "reason": self.lora.reason,
                **(self.policy.describe() if self.policy is not None else {}),
            },
            "standby": None if self.standby is None else {
                "released": self.standby.released,
                "cycles": self.standby.cycles,
                "seconds": dict(self.standby.seconds),
                "kv_bytes_resident": self.standby.mechanism.resident_bytes(),
                "kv_blocks": self.standby.blocks.describe() if self.standby.blocks is not None else None,
            },
            "no standby": self.standby_refusal,
            "no expandable segments": self.unexpanded,
            "compile": self.compilation.describe() if self.compilation is not None else None,
            "memory_plan": self.memory.as_dict() if self.memory is not None else None,
            "skinny_linear": CHOICES.describe(self.skinny) if self.skinny is not None else None,
            "decode_attention": launched(),
            "agreement": self.agreement.describe(),
            "seconds": dict(self.seconds),
        }  # fmt: skip


def _room(budget: Budget, device: torch.device, limit: int | None) -> Room | None:
    """What the device has for trainer and engine; None on a CPU to which no size was given."""
    host = free_bytes(torch.device("cpu"))
    if device.type == "cpu":
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return Room(pages, limit=limit, host=host) if limit is not None else None
    make_room(device)
    module = torch.get_device_module(device)
    free, total = module.mem_get_info(device)
    fraction = getattr(module, "get_per_process_memory_fraction", lambda _: 1.0)(device)
    if fraction < 1:
        limit = min(int(fraction * total), limit or total)
    own = [budget.model, getattr(budget.trainer, "ref_model", None)]
    later = [reward for reward in getattr(budget.trainer, "reward_funcs", ()) if isinstance(reward, torch.nn.Module)]
    held = _bytes_on(device, own, there=True) + CONTEXT
    return Room(total, max(total - free - held, 0) + _bytes_on(device, later, there=False), limit, host)


def _bytes_on(device: torch.device, modules: list[Any], *, there: bool) -> int:
    """Of the tensors of `modules` that are on `device`, or that are not."""
    tensors = (t for m in modules if isinstance(m, torch.nn.Module) for t in (*m.parameters(), *m.buffers()))
    found = {id(t): t.nbytes for t in tensors if (t.device == device) is there}
    return sum(found.values())


def _merged(choice: LoraChoice) -> str:
    return f"the model has PEFT adapters, which TRL merges into the base ({choice.reason})"


def _say(choice: LoraChoice) -> None:
    level = logging.WARNING if choice.fell_back else logging.INFO
    logger.log(level, "rlpatch: LoRA by %s: %s", choice.mode, choice.reason)


def missing_path() -> UsageError:
    """The error for a trainer's model without a path: the engine reads its config and tokenizer from there."""
    return UsageError(
        "the trainer's model has no name_or_path, and vLLM reads config and tokenizer from there; save both to a folder "
        "(model.config.save_pretrained, tokenizer.save_pretrained) and set model.name_or_path to it"
    )
