"""The switchboard behind ``rlpatch.apply``: settings in, adapters chosen, patch sets stacked, outcomes out."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from rlpatch import allocator, registry, versions
from rlpatch.config import listing
from rlpatch.config.defaults import NAMES
from rlpatch.errors import PatchError, UnsupportedError
from rlpatch.patching import PatchSet, when_imported
from rlpatch.registry import Adapter, Context, Outcome, State
from rlpatch.settings import Settings, resolve

logger = logging.getLogger("rlpatch")


@dataclass(frozen=True)
class Report:
    """What became of each capability, and the state of live trainer/engine pairs.

    Attributes:
        applied: Whether `apply` is in force.
        outcomes: One per capability.
        pairs: One dict per live pair (see `rlpatch.phases.Colocation.describe`).
        configs: What was changed in the latest configs (see `rlpatch.config.listing`).
        precision: One dict per trained model (see `rlpatch.precision.model.Prepared.describe`).
    """

    applied: bool
    outcomes: tuple[Outcome, ...] = ()
    pairs: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    configs: tuple[listing.Listing, ...] = ()
    precision: tuple[dict[str, Any], ...] = ()

    def __getitem__(self, capability: str) -> Outcome:
        for outcome in self.outcomes:
            if outcome.capability == capability:
                return outcome
        raise KeyError(capability)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "applied": self.applied,
            "outcomes": [outcome.as_dict() for outcome in self.outcomes],
            "pairs": list(self.pairs),
            "precision": list(self.precision),
            "notes": list(self.notes),
            "configs": [entry.as_dict() for entry in self.configs],
        }

    def __str__(self) -> str:
        lines = ["rlpatch is applied" if self.applied else "rlpatch is not applied"]
        lines += [f"  {outcome}" for outcome in self.outcomes]
        lines += [f"  {note}" for note in self.notes]
        for kind, described in (("pair", self.pairs), ("precision", self.precision)):
            for facts in described:
                lines.append(
                    f"  {kind}: "
                    + ", ".join(f"{key} {value}" for key, value in facts.items() if value not in (None, [], {}))
                )
        for entry in self.configs:
            lines += [f"  {line}" for line in str(entry).splitlines()]
        return "\n".join(lines)


@dataclass
class _Run:
    """One `apply` in force."""

    settings: Settings
    context: Context
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    sets: list[PatchSet] = field(default_factory=list)
    judged: set[tuple[str, str]] = field(default_factory=set)
    over: bool = False


_run: _Run | None = None
_lock = threading.RLock()


def apply(**arguments: Any) -> Report:
    """See `rlpatch.apply`."""
    global _run
    with _lock:
        known = registry.capabilities()
        settings = resolve(**arguments, known=known, known_defaults=NAMES)
        if _run is not None:
            if _run.settings == settings:
                return status()
            logger.info("rlpatch: settings changed; reverting and applying anew")
            revert()
        chosen = NAMES if settings.defaults is True else settings.defaults or ()
        limit = None if isinstance(settings.memory_plan, bool) else settings.memory_plan
        context = Context(
            settings.wants("standby"), settings.wants("share_weights"), settings.lora, chosen, settings.precision,
            settings.compile, limit, settings.park_optimizer, settings.expandable_segments,
        )  # fmt: skip
        run = _Run(settings, context)
        try:
            for capability, library in known.items():
                _start(run, capability, library)
        except BaseException:
            _undo(run)
            raise
        _run = run
        _warn(run)
        return status()


def context() -> Context | None:
    """The settings and providers of the `apply` in force, as adapters see them; None when nothing is applied."""
    return _run.context if _run is not None else None


def _start(run: _Run, capability: str, library: str) -> None:
    """Decide one capability as far as versions tell, and arm the rest for when its module is imported."""
    if not run.settings.wants(capability):
        off = "off unless asked for" if run.settings.off_by_default(capability) else "switched off"
        run.outcomes[capability] = Outcome(capability, library, State.SKIPPED, reason=off)
        return
    found = versions.installed(library)
    choice = registry.choose(capability, found, probing=False)
    if choice.adapter is None:
        state = State.SKIPPED if found.version is None and found.problem is None else State.UNSUPPORTED
        outcome = Outcome(capability, library, state, None, choice.reason, _text(found), choice.supported)
        run.outcomes[capability] = outcome
        run.context.reasons[capability] = outcome.reason
        _complain(run, outcome)
        return
    run.outcomes[capability] = Outcome(
        capability, library, State.WAITING, choice.adapter.name, f"until {choice.adapter.module} is imported",
        _text(found), choice.supported,
    )  # fmt: skip
    when_imported(choice.adapter.module, lambda module: _arrived(run, capability, library, module))


def _arrived(run: _Run, capability: str, library: str, module: ModuleType) -> None:
    """The library is imported: let probes decide, then patch."""
    with _lock:
        if run.over or run.outcomes[capability].state is not State.WAITING:
            return
        found = versions.installed(library)
        text = _text(found)
        # Only adapters that live in this module can be judged now; the others' modules may not be imported.
        options = [a for a in registry.candidates(capability) if a.module == module.__name__]
        supported = tuple(a.versions for a in registry.candidates(capability))
        try:
            choice = registry.choose(capability, found, probing=True, options=options)
        except Exception as error:
            run.outcomes[capability] = Outcome(
                capability, library, State.FAILED, None, f"its probe failed: {error!r}", text, supported
            )
            _complain(run, run.outcomes[capability])
            return
        adapter = choice.adapter
        run.judged.add((capability, module.__name__))
        if adapter is None and _wait_elsewhere(run, capability, library, choice.reason, text, supported):
            return
        if adapter is None:
            outcome = Outcome(capability, library, State.UNSUPPORTED, None, choice.reason, text, supported)
        else:
            outcome = _patch(run, adapter, choice.reason, text, supported)
        run.outcomes[capability] = outcome
        if capability not in run.context.providers:
            run.context.reasons[capability] = outcome.reason
        _complain(run, outcome)
        logger.info("rlpatch: %s", outcome)


def _wait_elsewhere(
    run: _Run, capability: str, library: str, reason: str, found: str | None, supported: tuple[str, ...]
) -> bool:
    """No adapter for this module fits; arm on the modules of the others (a version number may have misled)."""
    for other in reversed(registry.candidates(capability)):
        if other.probe is None or (capability, other.module) in run.judged:
            continue
        why = f"{reason}; until {other.module} is imported"
        run.outcomes[capability] = Outcome(capability, library, State.WAITING, other.name, why, found, supported)
        when_imported(other.module, lambda module: _arrived(run, capability, library, module))
        return True
    return False


def _patch(run: _Run, adapter: Adapter, reason: str, found: str | None, supported: tuple[str, ...]) -> Outcome:
    def outcome(state: State, why: str = "") -> Outcome:
        return Outcome(adapter.capability, adapter.library, state, adapter.name, why or reason, found, supported)

    irrelevant = adapter.relevant() if adapter.relevant is not None else None
    if irrelevant is not None:
        return outcome(State.SKIPPED, irrelevant)
    if adapter.native:
        return outcome(State.NATIVE, reason or "upstream does it")
    if adapter.patches is not None:

        def changed(late: PatchSet) -> None:
            """A module that came later did not fit: the set rolled itself back, and that must not pass for applied."""
            if late.state == "failed" and run.outcomes[adapter.capability].state is State.APPLIED:
                run.outcomes[adapter.capability] = outcome(State.FAILED, str(late.error))
                run.context.providers.pop(adapter.capability, None)
                logger.warning("rlpatch: %s; %s stays as it was", run.outcomes[adapter.capability], adapter.library)

        patch_set = PatchSet(adapter.name, adapter.patches(run.context), on_change=changed)
        try:
            patch_set.apply()
        except Exception as error:
            return outcome(State.FAILED, str(error))
        run.sets.append(patch_set)
    run.context.providers[adapter.capability] = adapter.provides
    return outcome(State.APPLIED)


def _complain(run: _Run, outcome: Outcome) -> None:
    """Unsupported or failed is an error when asked for strictly or by name; a warning comes from `_warn` otherwise."""
    if outcome.state not in (State.UNSUPPORTED, State.FAILED):
        return
    by_name = run.settings.include is not None and outcome.capability in run.settings.include
    if run.settings.strict or by_name:
        _undo(run)
        nearest = f"; supported: {outcome.library} {' and '.join(outcome.supported)}" if outcome.supported else ""
        raise UnsupportedError(
            f"{outcome.capability} cannot be applied to {outcome.library} {outcome.found}: {outcome.reason}{nearest}. "
            f"Install a supported {outcome.library}, or exclude={outcome.capability!r} to go on without it."
        )
    if run is _run:
        logger.warning("rlpatch: %s; %s stays as it was", outcome, outcome.library)


def _warn(run: _Run) -> None:
    for outcome in run.outcomes.values():
        if outcome.state in (State.UNSUPPORTED, State.FAILED):
            logger.warning("rlpatch: %s; %s stays as it was", outcome, outcome.library)


def _phases() -> Any:
    """The module `rlpatch.phases` if some adapter has needed it; importing it imports torch, which apply() must not."""
    return sys.modules.get("rlpatch.phases")


def _precision() -> Any:
    """Likewise `rlpatch.precision.model`, which a trainer's adapter imports."""
    return sys.modules.get("rlpatch.precision.model")


def _parking() -> Any:
    """Likewise `rlpatch.parking`, which an optimizer's adapter imports."""
    return sys.modules.get("rlpatch.parking")


def _text(found: versions.Installed) -> str | None:
    return str(found.version) if found.version else None


def _undo(run: _Run) -> list[str]:
    run.over = True
    notes: list[str] = []
    while run.sets:
        notes += run.sets.pop().revert()
    return notes


def revert() -> Report:
    """See `rlpatch.revert`."""
    global _run
    with _lock:
        if _run is None:
            return Report(False)
        notes = _phases().part_all() if _phases() else []
        if _precision():
            _precision().undo_all()
        if _parking():
            _parking().close_all()
        allocator.collapse()
        notes += _undo(_run)
        _run = None
        listing.clear()
        for note in notes:
            logger.warning("rlpatch: %s", note)
        return Report(False, notes=tuple(notes))


def status() -> Report:
    """See `rlpatch.status`."""
    with _lock:
        if _run is None:
            return Report(False)
        return Report(
            True,
            tuple(_run.outcomes.values()),
            tuple(pair.describe() for pair in (_phases().live() if _phases() else ())),
            configs=listing.listings(),
            precision=tuple(model.describe() for model in (_precision().live() if _precision() else ())),
        )


def switch(capability: str, on: bool) -> None:
    """Let the patches of an applied capability only forward, or do what they do again; for measuring.

    Raises:
        PatchError: it is not applied, or patches nothing.
    """
    with _lock:
        if _run is None or capability not in _run.outcomes:
            raise PatchError(f"{capability} cannot be switched: there is no such capability in force")
        outcome = _run.outcomes[capability]
        own = [patch_set for patch_set in _run.sets if patch_set.name == outcome.adapter]
        if not own:
            raise PatchError(f"{capability} cannot be switched: {outcome}, and wraps nothing")
        own[0].switch(on)


@contextlib.contextmanager
def patched(**settings: Any) -> Iterator[Report]:
    """See `rlpatch.patched`."""
    arguments = dict.fromkeys(
        (
            "standby",
            "share_weights",
            "defaults",
            "lora",
            "precision",
            "compile",
            "memory_plan",
            "one_forward",
            "park_optimizer",
            "expandable_segments",
            "include",
            "exclude",
            "strict",
        )
    )
    unknown = set(settings) - set(arguments)
    if unknown:
        raise TypeError(f"patched() got an unexpected argument {sorted(unknown)[0]!r}; it takes what apply() takes")
    report = apply(**{**arguments, **settings})
    try:
        yield report
    finally:
        revert()
