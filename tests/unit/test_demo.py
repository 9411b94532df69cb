"""The demo's verdict and its usage errors, without training anything."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from rlpatch.demo import command
from rlpatch.demo.worker import METRICS


def result(**changes: float) -> dict[str, Any]:
    return {"steps": [{name: changes.get(name, 0.5) for name in METRICS} for _ in range(3)]}


def test_equal_runs_agree_and_different_ones_are_named() -> None:
    assert command.compare(result(), result(), 5e-7) == []
    assert command.compare(result(), result(loss=0.5 + 4e-7), 5e-7) == []
    lines = command.compare(result(), result(loss=0.5001, reward=0.7), 5e-7)
    assert len(lines) == 2 and lines[0].startswith("loss differs by 0.0001 at step 1") and "reward" in lines[1]


def test_not_a_number_missing_values_and_missing_steps_are_differences() -> None:
    assert "grad_norm" in command.compare(result(), result(grad_norm=float("nan")), 5e-7)[0]
    hole = copy.deepcopy(result())
    hole["steps"][1]["reward"] = None
    assert "reward differs by inf at step 2" in command.compare(result(), hole, 5e-7)[0]
    assert "3 steps, patched 2" in command.compare(result(), {"steps": result()["steps"][:2]}, 5e-7)[0]


@pytest.mark.parametrize(
    "argument", [["--steps", "0"], ["--steps", "many"], ["--model", "no/such/folder"], ["--frobnicate"]]
)
def test_usage_errors_exit_with_2(argument: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(argument)
    assert ended.value.code == 2
    assert argument[0].lstrip("-") in capsys.readouterr().err


def test_without_the_libraries_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from rlpatch import versions

    monkeypatch.setattr(versions, "installed", lambda library: versions.Installed(library))
    assert command.main(["--json"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and "torch (not installed)" in captured.err


def test_commands_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    from rlpatch.__main__ import COMMANDS, main

    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in COMMANDS)
    assert main([]) == 2 and main(["nonsense"]) == 2
    assert "nonsense" in capsys.readouterr().err
