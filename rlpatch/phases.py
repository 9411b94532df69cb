"""The cycle of one trainer/engine pair: restore KV → put the policy in place → generate → release KV.

A `Colocation` is made by a trainer's adapter when it is about to build its engine. It decides whether the pair can
share, carries the trainer's tensors to the loader, and afterwards runs the cycle around every rollout.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from rlpatch.engine import Engine
from rlpatch.errors import StandbyError, UsageError
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
from rlpatch.registry import Context
from rlpatch.sharing.share import Renamer, Sharing, Slot
from rlpatch.standby import KVStandby

logger = logging.getLogger("rlpatch")

_building: contextvars.ContextVar[Colocation | None] = contextvars.ContextVar("rlpatch_building", default=None)
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

    Attributes:
        adapters: Reads the trainer's adapters (``providers["lora"]`` of its model), or None when it has none.
        lora: How they reach the engine.
        policy: Puts them in place around each rollout; None without adapters, and where TRL merges.
    """

    context: Context
    slots: list[Slot]
    refusal: str | None = None
    renamer: Renamer | None = None
    standby_refusal: str | None = None
    upstream_sleep: bool = False
    on_joined: Callable[[Colocation], None] | None = None
    engine: Engine | None = None
    sharing: Sharing | None = None
    adapters: Any = None
    lora: LoraChoice | None = None
    policy: Policy | None = None
    standby: KVStandby | None = None
    seconds: dict[str, float] = field(default_factory=lambda: {"sync": 0.0})
    number: int = 0
    _rolling: bool = False

    def __post_init__(self) -> None:
        self.number = 1 + max((pair.number for pair in _live), default=0)
        if not self.context.share_weights:
            self.refusal = "share_weights is off"
        elif "share_weights" not in self.context.providers:
            self.refusal = self.refusal or "no adapter shares weights with this vLLM"
        if not self.context.standby:
            self.standby_refusal = "standby is off"
        elif "standby" not in self.context.providers:
            self.standby_refusal = self.standby_refusal or "no adapter brings standby to this vLLM"

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
        """Whether the trainer's own sleep mode remains in charge: asked for, and the weights are the engine's alone."""
        asked = self.upstream_sleep and self.engine is not None and self.engine.sleep_mode
        return asked and not self.shares and self.standby is None

    @property
    def wants_standby(self) -> bool:
        """Whether the KV cache shall be released between rollouts."""
        return self.standby_refusal is None

    @property
    def lora_request(self) -> Any:
        """What every generation must carry for the engine to use the adapters' slots, or None."""
        return self.policy.request if isinstance(self.policy, SlotPolicy) else None

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
        reader = self.context.providers.get("lora")
        if reader is None:
            why = self.context.reasons.get("lora", "")
            self.lora = LoraChoice(MERGE, f"no adapter reads this PEFT {why}".strip(), fell_back=True)
        else:
            self.adapters = reader(model)
            adaptation = self.adapters.read()
            self.lora = choose(
                self.context.lora,
                adaptation,
                cannot_share=None if self.shares else self.refusal,
                cannot_slot=self._cannot_slot(adaptation),
                quantized=quantized,
            )
        if self.lora.mode == MERGE:
            why = f"the model has PEFT adapters, which TRL merges into the base ({self.lora.reason})"
            self.refusal = self.refusal or why
        level = logging.WARNING if self.lora.fell_back else logging.INFO
        logger.log(level, "rlpatch: LoRA by %s: %s", self.lora.mode, self.lora.reason)

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
        if self.lora is not None and self.lora.mode == SLOTS:
            rank = rank_of(self.adapters.read().targets)
            found.update(self.context.providers["lora_slots"].engine_arguments(rank))
        return found

    def _place_adapters(self) -> None:
        """The engine is complete: make the policy, or leave the adapters to TRL after all."""
        assert self.engine is not None and self.lora is not None
        if self.lora.mode == SLOTS:
            slots = Slots(self.engine, self.context.providers["lora_slots"](self.engine), self.adapters.read().targets)
            refused = slots.refusals()
            if refused:
                raise UsageError(
                    f"the engine's LoRA slots cannot serve {in_one_line(refused)}; apply(lora='fold') or "
                    "apply(lora='merge'), or leave these layers out of LoraConfig.target_modules"
                )
            slots.register()
            self.policy = SlotPolicy(self.adapters.read, slots)
        if self.lora.mode == FOLD and self.sharing is None:
            self.lora = LoraChoice(MERGE, f"the weights are not shared ({self.refusal})", fell_back=True)
            logger.warning("rlpatch: LoRA by %s: %s", self.lora.mode, self.lora.reason)
        if self.lora.mode == FOLD:
            assert self.sharing is not None
            path = str(getattr(self.adapters.model, "name_or_path", "") or "")
            policy = FoldPolicy(self.adapters.read, checkpoint_reader(path) if path else None)
            policy.guard(dict.fromkeys(entry.slot.module for entry in self.sharing.shared))
            self.policy = policy

    def _trains(self, name: str) -> bool:
        """Whether adapters change the tensor of that name, or train a copy of it."""
        slot = next((slot for slot in self.slots if slot.name == name), None)
        trained = slot is not None and bool(slot.tensor.requires_grad)
        return trained or any(name == target.parameter for target in self.adapters.read().targets)

    # ---- building ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def build(self) -> Iterator[None]:
        """Around the engine's construction: the loader and the constructor's adapter find this pair through `building`."""
        token = _building.set(self)
        try:
            yield
        except BaseException:
            self.abandon()
            raise
        finally:
            _building.reset(token)

    def loading(self) -> Sharing | None:
        """Called by the loader: the `Sharing` to fill the engine with, or None to load as usual."""
        if self.refusal is not None:
            return None
        self.sharing = Sharing(self.slots, self.renamer)
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
        if self.sharing is not None:
            self.sharing.verify()
            if not self.sharing.shared:
                reasons = sorted(set(self.sharing.report().copied.values()))
                self.refuse("; ".join(reasons) or "the engine has none of the trainer's tensors")
        if self.sharing is not None and self.lora is not None:
            lost = [name for name, why in self.sharing.absent.items() if self._trains(name)]
            if lost:
                self.refuse(f"adapters change {', '.join(lost)}, and the engine has no such tensor")
        if self.lora is not None:
            self._place_adapters()
        if self.sharing is not None:
            logger.info("rlpatch: %s", self.sharing.report())
            for name, reason in self.sharing.report().copied.items():
                logger.info("rlpatch: %s is copied on each sync: %s", name, reason)
        elif self.context.share_weights:
            logger.warning("rlpatch: weights are not shared (%s); TRL's own weight sync is used", self.refusal)
        # Unshared weights that the user wants asleep are released by upstream's own sleep mode, KV included.
        if self.upstream_sleep and not self.shares and self.engine.sleep_mode:
            self.standby_refusal = "the trainer's own sleep mode is on"
        if self.wants_standby:
            try:
                self.standby = KVStandby(self.engine, self.context.providers["standby"](self.engine))
                self.standby.release()
            except StandbyError as error:
                self.standby, self.standby_refusal = None, str(error)
                logger.warning("rlpatch: the KV cache stays resident: %s", error)
        if self.upstream_sleep and not self.upstream_sleep_stays:
            logger.info("rlpatch: the trainer's sleep mode became KV standby: its weights are shared or stay resident")
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
        self.engine.llm.reset_prefix_cache()

    @contextlib.contextmanager
    def rollout(self) -> Iterator[None]:
        """Around generation: policy and KV cache are in place inside, and out again afterwards, whatever happens inside."""
        if self._rolling:  # the engine's generate inside of the trainer's
            yield
            return
        self._rolling = True
        try:
            with self._policy_in_place(), self._kv_in_place():
                yield
        finally:
            self._rolling = False

    @contextlib.contextmanager
    def _policy_in_place(self) -> Iterator[None]:
        if self.policy is None:
            yield
            return
        self.policy.put()
        try:
            assert self.engine is not None
            self.engine.llm.reset_prefix_cache()
            if self.sharing is not None and self.sharing.copied and self.lora is not None and self.lora.mode == FOLD:
                self.sharing.sync()
            yield
        finally:
            self.policy.take_out()

    @contextlib.contextmanager
    def _kv_in_place(self) -> Iterator[None]:
        if self.standby is None:
            yield
            return
        if self.standby.released:
            self.standby.restore()
        try:
            yield
        except BaseException as error:
            try:
                self.standby.release()
            except Exception as second:  # the first error is the one to show
                logger.warning("rlpatch: after %r the KV cache could not be released: %s", error, second)
            raise
        else:
            self.standby.release()

    def sleep(self) -> None:
        """What ``LLM.sleep(level ≥ 1)`` means for this pair: the weights are the trainer's too, so only KV goes."""
        if self.standby is None:
            raise StandbyError(
                f"this engine shares its weights with the trainer and cannot sleep ({self.standby_refusal}); "
                "apply(standby=True), or apply(share_weights=False) to let vLLM's sleep mode have its own copy"
            )
        if not self.standby.released:
            self.standby.release()

    def wake(self) -> None:
        """What ``LLM.wake_up`` means for this pair."""
        if self.standby is not None and self.standby.released:
            self.standby.restore()

    # ---- parting -----------------------------------------------------------------------------------------------

    def part(self) -> None:
        """Make the pair ordinary again: KV restored, the trainer's weights in memory of their own."""
        try:
            if self.standby is not None and self.standby.released:
                self.standby.restore()
        finally:
            if isinstance(self.policy, FoldPolicy):
                self.policy.take_out()
                self.policy.unguard()
            elif isinstance(self.policy, SlotPolicy):
                self.policy.slots.remove()
            if self.sharing is not None:
                self.sharing.part()
            self.standby = self.policy = None
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
            },
            "no standby": self.standby_refusal,
            "seconds": dict(self.seconds),
        }  # fmt: skip


def missing_path() -> UsageError:
    """The error for a trainer's model without a path: the engine reads its config and tokenizer from there."""
    return UsageError(
        "the trainer's model has no name_or_path, and vLLM reads config and tokenizer from there; save both to a folder "
        "(model.config.save_pretrained, tokenizer.save_pretrained) and set model.name_or_path to it"
    )
