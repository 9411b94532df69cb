"""Adapter declarations, and which one serves the installed versions.

An adapter is one file under ``rlpatch/adapters/<library>/`` with a module-level ``ADAPTER``. The registry finds them by
looking into that package; nothing names them. Choosing works on data alone: the version picks candidates, the probe,
which looks at the real thing, decides (development builds and local version segments lie).
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from typing import Any

from packaging.specifiers import SpecifierSet

from rlpatch.patching import Patch
from rlpatch.relies import Relies
from rlpatch.versions import Installed, within

logger = logging.getLogger("rlpatch")


class State(str, Enum):
    """What became of one capability."""

    APPLIED = "applied"
    NATIVE = "native"
    WAITING = "waiting"
    SKIPPED = "skipped"
    UNSUPPORTED = "unsupported"
    FAILED = "failed"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Outcome:
    """One capability's fate, as shown by logs, ``status()`` and ``doctor``.

    Attributes:
        capability: E.g. ``"standby"``.
        library: The library it adapts, e.g. ``"vllm"``.
        state: See `State`; ``waiting`` means armed until the library is imported.
        adapter: Name of the adapter file that serves it, or None.
        reason: Why, in one line.
        found: Installed version, as text, or None.
        supported: Version ranges that some adapter serves.
    """

    capability: str
    library: str
    state: State
    adapter: str | None = None
    reason: str = ""
    found: str | None = None
    supported: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**self.__dict__, "state": str(self.state), "supported": list(self.supported)}

    def __str__(self) -> str:
        where = f" by {self.adapter}" if self.adapter else ""
        why = f": {self.reason}" if self.reason else ""
        return f"{self.capability} {self.state}{where}{why}"


@dataclass
class Context:
    """What adapters get to see when they build their patches: the settings, and the providers chosen beside them.

    Attributes:
        standby: Whether KV standby is wanted.
        share_weights: Whether trainer and engine shall share one copy of the weights.
        lora: How a LoRA shall reach the engine (see `rlpatch.apply`).
        defaults: Which config defaults are wanted (see `rlpatch.config.defaults.NAMES`).
        precision: Of the trainer's weights (see `rlpatch.apply`).
        compile: How the engine is compiled and warmed up (see `rlpatch.apply`).
        park_optimizer: Whether the optimizer's state waits in host memory between steps: yes, no, or ``"auto"``.
        expandable_segments: Whether torch's allocator expands its segments: yes, no, or ``"auto"``.
        memory_limit: The most that a memory plan may count on, in bytes; None: all that the device has.
        providers: capability -> the chosen adapter's `provides` (filled as capabilities resolve).
        reasons: capability -> why it has none, in words.
    """

    standby: bool = True
    share_weights: bool = True
    lora: str = "auto"
    defaults: tuple[str, ...] = ()
    precision: str = "auto"
    compile: str = "default"
    memory_limit: int | None = None
    park_optimizer: bool | str = "auto"
    expandable_segments: bool | str = "auto"
    providers: dict[str, Any] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Adapter:
    """One capability of one library over one range of versions.

    Args:
        capability: What it brings, e.g. ``"standby"``.
        library: Import name of the library it adapts.
        versions: Specifier with a floor and a ceiling; the ceiling is above the newest release that was checked.
        module: The module whose import makes the adapter decidable (its probe may look at it).
        probe: Looks at the real thing; returns None when it fits, else what is missing.
        relevant: Returns None when the capability applies on this machine, else why not (e.g. "engine runs on CUDA").
        provides: What the cores use (a class, a function); may be None.
        patches: Builds the adapter's patches from the context; may be None.
        native: Upstream does it already; nothing is patched.
        broken: Why the capability stays off in these releases although a neighbour's probe would accept them, with the
            remedy; None: it works there.
        relies_on: What it touches of the library besides the targets of its patches, checked by `rlpatch.contracts`.
    """

    capability: str
    library: str
    versions: str
    module: str
    probe: Callable[[], str | None] | None = None
    relevant: Callable[[], str | None] | None = None
    provides: Any = None
    patches: Callable[[Context], Sequence[Patch]] | None = None
    native: bool = False
    broken: str | None = None
    name: str = ""
    relies_on: tuple[Relies, ...] = ()

    def __post_init__(self) -> None:
        operators = {clause.operator for clause in SpecifierSet(self.versions)}
        if not operators & {">=", ">", "=="} or not operators & {"<", "<=", "=="}:
            raise ValueError(
                f"adapter {self.name or self.capability}: versions={self.versions!r} needs a floor and a ceiling"
            )


@dataclass(frozen=True)
class Choice:
    """The adapter picked for a capability, or why there is none."""

    adapter: Adapter | None
    reason: str
    supported: tuple[str, ...]


@cache
def adapters() -> tuple[Adapter, ...]:
    """Every adapter found under ``rlpatch.adapters``, by file name. Adapter files import nothing heavy at the top."""
    package = importlib.import_module("rlpatch.adapters")
    found = []
    for info in sorted(pkgutil.walk_packages(package.__path__, "rlpatch.adapters."), key=lambda info: info.name):
        if info.ispkg or info.name.rpartition(".")[2].startswith("_"):
            continue
        adapter = getattr(importlib.import_module(info.name), "ADAPTER", None)
        if adapter is None:
            raise TypeError(f"{info.name} has no ADAPTER; shared code in rlpatch/adapters goes into a file named _….py")
        name = info.name.removeprefix("rlpatch.adapters.").replace(".", "/")
        found.append(Adapter(**{**adapter.__dict__, "name": name}))
    return tuple(found)


def capabilities() -> dict[str, str]:
    """capability -> library, for every capability that some adapter brings."""
    return {adapter.capability: adapter.library for adapter in adapters()}


def candidates(capability: str) -> tuple[Adapter, ...]:
    """Adapters of one capability, oldest range first."""
    own = [adapter for adapter in adapters() if adapter.capability == capability]
    return tuple(sorted(own, key=_floor))


def _floor(adapter: Adapter) -> Any:
    from packaging.version import Version

    return max(Version(c.version) for c in SpecifierSet(adapter.versions) if c.operator in (">=", ">", "=="))


def choose(capability: str, found: Installed, *, probing: bool, options: Sequence[Adapter] | None = None) -> Choice:
    """Pick the adapter for `capability` on the installed release.

    Args:
        probing: False before the library is imported: the version number alone decides, and a release outside every
            range stays open when some adapter has a probe. True afterwards: the probe wins over the number.
        options: Adapters to choose from; default: all of that capability.
    """
    pool = tuple(options) if options is not None else candidates(capability)
    supported = tuple(adapter.versions for adapter in pool if adapter.broken is None)
    if found.version is None:
        return Choice(None, found.problem or f"{found.library} is not installed", supported)
    version = found.version
    for adapter in pool:
        if adapter.broken is not None and within(version, adapter.versions):
            return Choice(None, adapter.broken, supported)
    pool = tuple(adapter for adapter in pool if adapter.broken is None)
    inside = [adapter for adapter in pool if within(version, adapter.versions)]
    outside = [adapter for adapter in reversed(pool) if adapter not in inside and adapter.probe is not None]
    if not probing:
        if inside:
            return Choice(inside[0], "", supported)
        if outside:
            return Choice(
                outside[0], f"{version} lies outside {' and '.join(supported)}; its probe will decide", supported
            )
        return Choice(None, f"{found} lies outside {' and '.join(supported)}", supported)
    misfits = []
    for adapter in [*inside, *outside]:
        missing = adapter.probe() if adapter.probe is not None else None
        if missing is None:
            note = "" if adapter in inside else f"{version} lies outside {adapter.versions}; accepted by its probe"
            return Choice(adapter, note, supported)
        misfits.append(f"{adapter.name}: {missing}")
    return Choice(None, "; ".join(misfits) or f"{found} lies outside {' and '.join(supported)}", supported)
