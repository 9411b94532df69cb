"""Whether a release keeps the contracts, and what that means for each capability."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from rlpatch.contracts.declared import contract
from rlpatch.contracts.source import Tree, fingerprint, normal_text, parts, snippet
from rlpatch.registry import Adapter
from rlpatch.relies import Relies
from rlpatch.versions import within


class Verdict(str, Enum):
    """What a release means for one capability."""

    COVERED = "covered"
    NATIVE = "native"
    WOULD_BE = "would be covered"
    NONE = "none"
    UNCHECKED = "unchecked"
    NEEDS = "needs a new adapter"
    BROKEN = "broken"

    def __str__(self) -> str:
        return self.value

    @property
    def bad(self) -> bool:
        """Whether somebody has to do something."""
        return self in (Verdict.NEEDS, Verdict.BROKEN)


@dataclass(frozen=True)
class Failure:
    """One thing that an adapter relies on and a release does not have.

    Attributes:
        target: See `Relies`.
        reason: What is missing.
        held_in: Newest earlier release of the adapter's range in which it was there, or None when none was found.
        difference: Unified diff of the target's normalized code from `held_in` to this release; may be empty.
    """

    target: str
    reason: str
    held_in: str | None = None
    difference: str = ""


@dataclass(frozen=True)
class Judgement:
    """One capability on one release.

    Attributes:
        adapter: The adapter that it is about, or None.
        note: What follows from it, in one line.
        failures: Empty for everything but ``broken`` and ``needs a new adapter``.
    """

    library: str
    version: str
    capability: str
    verdict: Verdict
    adapter: str | None = None
    note: str = ""
    failures: tuple[Failure, ...] = field(default=())

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            **self.__dict__,
            "verdict": str(self.verdict),
            "failures": [failure.__dict__ for failure in self.failures],
        }


# ---- one declaration ---------------------------------------------------------------------------------------------------


def missing(tree: Tree, relies: Relies) -> str | None:
    """What this release lacks of `relies`, in one line, or None when it holds."""
    reason = _missing(tree, relies)
    if reason is None:
        return None
    for other in relies.otherwise:
        if missing(tree, other) is None:
            return None
    return " and ".join([reason, *(f"no {other} either" for other in relies.otherwise)])


def _missing(tree: Tree, relies: Relies) -> str | None:
    found = tree.find(relies.module, relies.path)
    if found is None:
        return f"there is no {_deepest_missing(tree, relies)}"
    asked = relies.parameters or relies.positional or relies.contains or relies.lacks or relies.fingerprints
    if found.external or found.node is None:
        return f"{relies} comes from another library now" if asked else None
    positional, names = tree.parameters(found)
    absent = [name for name in relies.parameters if name not in names]
    if absent:
        return f"{relies} takes no {', '.join(absent)} (it takes {', '.join(sorted(names)) or 'nothing'})"
    if positional[: len(relies.positional)] != list(relies.positional):
        return f"{relies} begins with ({', '.join(positional)}), not with ({', '.join(relies.positional)})"
    if relies.contains or relies.lacks:
        there = parts(found.node)
        for text in relies.contains:
            if snippet(text) not in there:
                return f"{relies} no longer contains `{text}`"
        for text in relies.lacks:
            if snippet(text) in there:
                return f"{relies} contains `{text}`"
    if relies.fingerprints and (now := fingerprint(found.node)) not in relies.fingerprints:
        return f"the code of {relies} is new (fingerprint {now}; known: {', '.join(relies.fingerprints)})"
    return None


def _deepest_missing(tree: Tree, relies: Relies) -> str:
    """The shortest beginning of the target that is not there: the module, the class, or the attribute."""
    if tree.module(relies.module) is None:
        return f"module {relies.module}"
    names = relies.path.split(".")
    for count in range(1, len(names)):
        if tree.find(relies.module, ".".join(names[:count])) is None:
            return f"{relies.module}:{'.'.join(names[:count])}"
    return str(relies)


def asked(relies: Relies, version: Version) -> bool:
    """Whether `relies` concerns this release."""
    return not relies.versions or within(version, relies.versions)


def broken(adapter: Adapter, version: Version, lacking: Callable[[Relies], str | None]) -> list[tuple[int, str]]:
    """(position in `contract`, what is missing) of everything that does not hold in this release.

    Args:
        lacking: `missing` of this release's sources.
    """
    found = []
    for position, relies in enumerate(contract(adapter)):
        if asked(relies, version) and (reason := lacking(relies)) is not None:
            found.append((position, reason))
    return found


# ---- capabilities ------------------------------------------------------------------------------------------------------


def judge(
    capability: str, version: Version, pool: Sequence[Adapter], found: Mapping[str, Sequence[tuple[int, str]]]
) -> Judgement:
    """What a release means for `capability`.

    Args:
        pool: The capability's adapters, oldest range first.
        found: Name of an adapter -> what `broken` gives for it on this release.
    """
    library = pool[0].library

    def judgement(verdict: Verdict, adapter: Adapter | None = None, note: str = "") -> Judgement:
        failures: tuple[Failure, ...] = ()
        if verdict.bad and adapter is not None:
            declared = contract(adapter)
            failures = tuple(Failure(declared[at].target, reason) for at, reason in found[adapter.name])
        name = adapter.name if adapter is not None else None
        return Judgement(library, str(version), capability, verdict, name, note, failures)

    for adapter in pool:
        if within(version, adapter.versions):
            if found[adapter.name]:
                return judgement(Verdict.BROKEN, adapter, f"its range {adapter.versions} says otherwise")
            if adapter.native:
                return judgement(Verdict.NATIVE, adapter)
            if adapter.broken is not None:
                return judgement(Verdict.NONE, adapter, f"left off: {adapter.broken}")
            if not contract(adapter):
                return judgement(Verdict.UNCHECKED, adapter, "it declares nothing that it relies on")
            return judgement(Verdict.COVERED, adapter)
    older = [adapter for adapter in pool if _floor(adapter) <= version]
    newer = [adapter for adapter in pool if adapter not in older]
    for adapter in (*reversed(older), *newer):
        if contract(adapter) and not found[adapter.name]:
            end, limit = ("floor", "lower") if adapter in newer else ("ceiling", "raise")
            return judgement(Verdict.WOULD_BE, adapter, f"{limit} the {end} of {adapter.versions} once it has been run")
    if not older:
        return judgement(Verdict.NONE, note=f"adapters begin at {pool[0].versions}")
    return judgement(Verdict.NEEDS, older[-1], f"{older[-1].versions} is the nearest; this is what it misses")


def _floor(adapter: Adapter) -> Version:
    return max(Version(c.version) for c in SpecifierSet(adapter.versions) if c.operator in (">=", ">", "=="))


def explain(
    failure: Failure,
    relies: Relies,
    tree: Tree,
    version: Version,
    earlier: Callable[[], Sequence[tuple[Version, Tree]]],
) -> Failure:
    """`failure` with the difference to the newest release in which it held.

    Args:
        earlier: Gives releases of the adapter's range before `version`, newest first (only called when needed).
    """
    reason = failure.reason
    now = tree.find(relies.module, relies.path)
    name = relies.path.rpartition(".")[2]
    if now is None and name:
        elsewhere = tree.defining(name)
        reason += f"; {name} is defined in {', '.join(elsewhere)}" if elsewhere else f"; nothing defines {name}"
    for before, source in earlier():
        if not asked(relies, before) or missing(source, relies) is not None:
            continue
        then = source.find(relies.module, relies.path)
        difference = ""
        if then is not None and now is not None and then.node is not None and now.node is not None and relies.path:
            old, new = (normal_text(node).splitlines() for node in (then.node, now.node))
            lines = difflib.unified_diff(old, new, f"{relies} ({before})", f"{relies} ({version})", lineterm="")
            difference = "\n".join(lines)
        return Failure(failure.target, reason, str(before), difference)
    return Failure(failure.target, reason)
