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
    standby: KVStandby | None = None
    seconds: dict[str, float] = field(default_factory=lambda: {"sync": 0.0})
    number: int = 0

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
        assert self.engine is not None and self.sharing is not None
        self.sharing.sync()
        self.engine.llm.reset_prefix_cache()

    @contextlib.contextmanager
    def rollout(self) -> Iterator[None]:
        """Around generation: the KV cache is there inside, and gone afterwards, whatever happens inside."""
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
