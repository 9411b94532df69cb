"""Adapter choice on data alone, versions without imports, settings and the environment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

import rlpatch
from rlpatch import control, registry, settings, versions
from rlpatch.errors import UnsupportedError, UsageError
from rlpatch.registry import Adapter, State, choose
from rlpatch.versions import Installed, within


def adapter(versions: str, name: str = "", probe=None) -> Adapter:
    return Adapter("thing", "lib", versions, module="lib", name=name or versions, probe=probe)


def lib(version: str) -> Installed:
    return Installed("lib", "lib", Version(version))


def test_versions_ignore_local_segments_and_admit_prereleases() -> None:
    assert within(Version("0.31.0+cu129"), ">=0.31,<0.32")
    assert within(Version("0.31.1rc1"), ">=0.31,<0.32")
    assert not within(Version("0.32.0"), ">=0.31,<0.32")


def test_a_range_without_a_ceiling_is_refused() -> None:
    for bad in (">=0.31", "<0.31", "!=0.3"):
        with pytest.raises(ValueError, match="floor and a ceiling"):
            adapter(bad)


def test_number_decides_before_import_probe_after() -> None:
    old, new = adapter(">=1,<2", "old", lambda: None), adapter(">=2,<3", "new", lambda: "feature is missing")
    assert choose("thing", lib("2.5"), probing=False, options=(old, new)).adapter is new
    choice = choose("thing", lib("2.5"), probing=True, options=(old, new))
    assert choice.adapter is old and "accepted by its probe" in choice.reason


def test_above_the_ceiling_the_probe_decides() -> None:
    fits, misfits = adapter(">=1,<2", "fits", lambda: None), adapter(">=1,<2", "misfits", lambda: "gone")
    assert choose("thing", lib("9.0"), probing=True, options=(fits,)).adapter is fits
    choice = choose("thing", lib("9.0"), probing=True, options=(misfits,))
    assert choice.adapter is None and "gone" in choice.reason and choice.supported == (">=1,<2",)
    assert choose("thing", lib("9.0"), probing=False, options=(adapter(">=1,<2"),)).adapter is None


def test_every_adapter_is_found_and_says_where_it_lives() -> None:
    found = registry.adapters()
    assert {"standby", "share_weights", "engine", "generation", "cpu_weights"} <= {a.capability for a in found}
    for each in found:
        library = each.name.split("/")[0]
        assert each.library == library and each.module.split(".")[0] == library
        documentation = sys.modules[f"rlpatch.adapters.{each.name.replace('/', '.')}"].__doc__ or ""
        assert "Delete when" in documentation, f"{each.name} does not say when it can be deleted"


def test_ranges_of_one_capability_do_not_overlap() -> None:
    probes = [Version(f"{major}.{minor}.{patch}") for major in (0, 1) for minor in range(40) for patch in (0, 1, 2)]
    for capability in registry.capabilities():
        for version in probes:
            serving = [a.name for a in registry.candidates(capability) if within(version, a.versions)]
            assert len(serving) <= 1, f"{capability} {version}: {serving}"


def test_installed_never_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "halfway-1.0.dist-info").mkdir()
    (tmp_path / "halfway-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: halfway\nVersion: 1.0\n")
    (tmp_path / "orphan").mkdir()
    (tmp_path / "orphan" / "__init__.py").write_text("raise RuntimeError('never import me')")
    (tmp_path / "vague-1.dist-info").mkdir()
    (tmp_path / "vague-1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: vague\nVersion: not a version\n"
    )
    assert "package is not" in (versions.installed("halfway").problem or "")
    assert "no distribution" in (versions.installed("orphan").problem or "")
    assert versions.installed("vague").version is None
    assert not versions.installed("surely_not_there_at_all").present


RESOLVE = dict(
    standby=None,
    share_weights=None,
    defaults=None,
    lora=None,
    include=None,
    exclude=None,
    strict=None,
    known=("a", "b"),
)


def test_explicit_beats_environment_beats_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings.resolve(**RESOLVE).standby is True
    monkeypatch.setenv("UNSLOTH_VLLM_STANDBY", "0")
    assert settings.resolve(**RESOLVE).standby is False
    monkeypatch.setenv("RLPATCH_STANDBY", "1")
    assert settings.resolve(**RESOLVE).standby is True
    assert settings.resolve(**{**RESOLVE, "standby": False}).standby is False
    monkeypatch.setenv("RLPATCH_EXCLUDE", "a")
    assert settings.resolve(**RESOLVE).exclude == ("a",)


@pytest.mark.parametrize(
    ("variable", "value"),
    [("RLPATCH_STANDBY", "maybe"), ("RLPATCH_INCLUDE", "a,nonsense"), ("UNSLOTH_VLLM_STANDBY", "on please")],
)
def test_bad_environment_names_the_variable(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(UsageError, match=variable):
        settings.resolve(**RESOLVE)


def test_bad_arguments_patch_nothing() -> None:
    with pytest.raises(UsageError, match="nonsense"):
        rlpatch.apply(include=["nonsense"])
    with pytest.raises(UsageError, match="both"):
        rlpatch.apply(include=["standby"], exclude=["standby"])
    with pytest.raises(UsageError, match="standby"):
        rlpatch.apply(standby="yes")
    with pytest.raises(TypeError, match="standy"), rlpatch.patched(standy=True):
        pass
    assert rlpatch.status().applied is False


def test_apply_imports_nothing_heavy_and_import_is_quick() -> None:
    script = (
        "import sys, time; start = time.perf_counter(); import rlpatch; spent = time.perf_counter() - start; "
        "rlpatch.apply(); rlpatch.status(); "
        "heavy = [m for m in ('torch', 'vllm', 'trl', 'transformers') if m in sys.modules]; print(spent, heavy)"
    )
    best = 9.0
    for _ in range(5):
        answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
        spent, heavy = answer.split(" ", 1)
        assert heavy.strip() == "[]"
        best = min(best, float(spent))
    assert best < 0.05


def test_unsupported_is_an_error_when_strict_and_a_warning_otherwise(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def ancient(library: str) -> Installed:
        return Installed(library, library, Version("0.1.0"))

    monkeypatch.setattr(versions, "installed", ancient)
    monkeypatch.setattr(registry.Adapter, "probe", None, raising=False)
    monkeypatch.setattr(control.registry, "choose", _by_number)
    with pytest.raises(UnsupportedError, match=r"0\.1\.0.*supported"):
        rlpatch.apply(strict=True)
    assert rlpatch.status().applied is False
    with pytest.raises(UnsupportedError, match="standby"):
        rlpatch.apply(include=["standby"])
    assert rlpatch.status().applied is False
    report = rlpatch.apply()
    try:
        assert report["standby"].state is State.UNSUPPORTED
        assert report["standby"].found == "0.1.0" and report["standby"].supported
        assert any("standby unsupported" in record.message for record in caplog.records)
    finally:
        rlpatch.revert()


_choose = registry.choose


def _by_number(capability: str, found: Installed, *, probing: bool, options=None) -> registry.Choice:
    """Choose as for adapters without probes: outside every range nothing serves."""
    import dataclasses

    pool = [dataclasses.replace(a, probe=None) for a in (options or registry.candidates(capability))]
    return _choose(capability, found, probing=probing, options=pool)


def test_what_is_off_until_asked_for_says_so() -> None:
    with rlpatch.patched() as report:
        assert report["compile"].reason == "off unless asked for"
        assert "off" not in (report["park_optimizer"].reason or "")  # "auto"
    with rlpatch.patched(park_optimizer=False, exclude=["compile"]) as report:
        assert report["park_optimizer"].reason == report["compile"].reason == "switched off"


@pytest.mark.parametrize("name", ["park_optimizer", "expandable_segments"])
@pytest.mark.parametrize(
    ("given", "variable", "found"),
    [
        (None, None, "auto"), (None, "auto", "auto"), (None, "1", True), (True, "0", True), ("auto", "1", "auto"),
        (False, "1", False),
    ],
)  # fmt: skip
def test_yes_no_or_auto(name: str, given: Any, variable: Any, found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if variable is not None:
        monkeypatch.setenv(f"RLPATCH_{name.upper()}", variable)
    with rlpatch.patched(**{name: given}) as report:
        context = control.context()
        assert context is not None and getattr(context, name) == found
        assert ((report[name].reason or "") == "switched off") is (found is False)


@pytest.mark.parametrize("name", ["park_optimizer", "expandable_segments"])
def test_nothing_else_than_yes_no_or_auto(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=rf"{name}='often'.*expected True, False, 'auto' or None"):
        rlpatch.apply(**{name: "often"})
    monkeypatch.setenv(f"RLPATCH_{name.upper()}", "often")
    with pytest.raises(UsageError, match=f"RLPATCH_{name.upper()}"):
        rlpatch.apply()


def test_report_is_data() -> None:
    with rlpatch.patched(standby=False) as report:
        assert report["standby"].state is State.SKIPPED and report["standby"].reason == "switched off"
        assert {o["capability"] for o in report.as_dict()["outcomes"]} >= {"standby", "generation", "defaults"}
        assert rlpatch.apply(standby=False).as_dict() == report.as_dict()
    assert rlpatch.status().applied is False
    with pytest.raises(KeyError):
        rlpatch.status()["standby"]


def test_a_patch_that_fails_at_a_later_import_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The set rolls back by itself; its outcome must turn from applied to failed."""
    import importlib

    from rlpatch.patching import Patch

    name = f"rlpatch_late_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    late = Adapter(
        "thing", "lib", ">=1,<2", module="lib", name="lib/thing", patches=lambda context: [Patch(name, "gone", print)]
    )
    run = control._Run(settings.resolve(**RESOLVE), registry.Context())
    run.outcomes["thing"] = control._patch(run, late, "", "1.0", (">=1,<2",))
    assert run.outcomes["thing"].state is State.APPLIED
    importlib.import_module(name)
    assert run.outcomes["thing"].state is State.FAILED and "gone" in run.outcomes["thing"].reason
    assert "thing" not in run.context.providers
