"""The bench of engine starts around its processes: Triton's seconds, the table, what an interrupted run keeps; no torch."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from rlpatch.bench import compile as bench
from rlpatch.bench.memory_watch import Clock
from rlpatch.bench.start import PHASES, START, not_timed, watch
from rlpatch.bench.triton_clock import TritonClock

# ---- Triton ----------------------------------------------------------------------------------------------------------


class FakeTriton(ModuleType):
    """Stands for Triton 3.6, which is not on this machine: what ``triton.compile`` does with its listener, and no more."""

    def __init__(self) -> None:
        super().__init__("triton")
        self.knobs = SimpleNamespace(compilation=SimpleNamespace(listener=None))

    def compile(self, name: str, seconds: float = 0.0, cache_hit: bool = False, told: float | None = None) -> None:
        listener = self.knobs.compilation.listener
        time.sleep(seconds)
        if listener:
            times = SimpleNamespace(total=int(1e6 * (seconds if told is None else told)))  # CompileTimes: microseconds
            listener(src=SimpleNamespace(name=name), metadata={}, metadata_group={}, times=times, cache_hit=cache_hit)


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> FakeTriton:
    fake = FakeTriton()
    fake.__spec__ = SimpleNamespace(name="triton", loader=None)  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "triton", fake)
    return fake


def test_triton_s_seconds_are_a_phase_and_are_told_by_kernel(triton: FakeTriton) -> None:
    clock = Clock()
    listening = TritonClock(clock)
    assert listening.start() is None
    triton.compile("before_the_start", 0.01)  # outside of any phase: told, and no phase's
    with clock.phase("start"):
        time.sleep(0.02)
        with clock.phase("dummy rollout"):
            triton.compile("_topk_topp_kernel", 0.05)
            triton.compile("_topk_topp_kernel", 0.03)
            triton.compile("_bias_kernel", 0.01)
            triton.compile("_gumbel_kernel", 0.01, cache_hit=True)
    own = clock.seconds(clock.step)
    whole = next(i for i in clock.intervals if i.name == "start")
    assert sum(own.values()) == pytest.approx(whole.end - whole.start)  # every second once
    assert own["triton"] == pytest.approx(0.1, abs=0.01) and own["dummy rollout"] < 0.05 and own["start"] >= 0.02
    heard = listening.take()
    assert heard is not None
    assert (heard["compiled"], heard["cached"]) == (4, 1)
    assert next(iter(heard["largest"])) == "_topk_topp_kernel"
    assert heard["largest"]["_topk_topp_kernel"] == pytest.approx(0.08, abs=1e-3)
    assert heard["seconds"] == pytest.approx(0.1, abs=1e-3) and heard["cached_seconds"] == pytest.approx(0.01, abs=1e-3)
    assert listening.take() is None


def test_triton_tells_no_more_seconds_than_there_were() -> None:
    clock = Clock()
    with clock.phase("outer"):
        clock.book("triton", 100.0)
        with clock.phase("triton"):
            clock.book("triton", 1.0)  # part of it already
    assert all(seconds >= 0 for seconds in clock.seconds(-1).values()) and clock.seconds(-1)["triton"] < 1


def test_whoever_listens_to_triton_already_goes_on(triton: FakeTriton) -> None:
    heard: list[str] = []
    triton.knobs.compilation.listener = lambda **event: heard.append(event["src"].name)
    listening = TritonClock(Clock())
    assert listening.start() is None
    triton.compile("a")
    assert heard == ["a"] and listening.take() is not None


def test_kernels_compiled_in_other_threads_are_no_phase_of_this_one(triton: FakeTriton) -> None:
    clock = Clock()
    listening = TritonClock(clock)
    listening.start()
    with clock.phase("start"):
        thread = threading.Thread(target=triton.compile, args=("a", 0.02))
        thread.start()
        thread.join()
    assert "triton" not in clock.seconds(-1)
    heard = listening.take()
    assert heard is not None and heard["compiled"] == 1


def test_without_triton_there_is_no_phase(monkeypatch: pytest.MonkeyPatch, triton: FakeTriton) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    listening = TritonClock(Clock())
    assert listening.start() is None and listening.take() is None
    monkeypatch.undo()
    del triton.knobs  # Triton 3.3
    monkeypatch.setitem(sys.modules, "triton", triton)
    assert "3.4 and later" in (TritonClock(Clock()).start() or "")


# ---- what is timed ---------------------------------------------------------------------------------------------------


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A library with a module that breaks when it is imported where it should not be."""
    folder = tmp_path / "rlpatch_fake_engine"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "worker.py").write_text("def work():\n    return 1\n")
    (folder / "other_platform.py").write_text("raise AssertionError('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    for name in [name for name in sys.modules if name.startswith("rlpatch_fake_engine")]:
        del sys.modules[name]


def test_targets_are_wrapped_when_imported_and_what_is_missing_is_told(library: Path) -> None:
    calls: list[str] = []

    def phase(name: str) -> Any:
        def wrapper(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
            calls.append(name)
            return wrapped(*args, **kwargs)

        return wrapper

    name = "rlpatch_fake_engine"
    targets = [
        ("work", f"{name}.worker", "work"),
        ("gone", f"{name}.worker", "gone"),
        ("other", f"{name}.other_platform", "work"),
        ("absent", f"{name}.absent.deep", "work"),
        ("absent", "rlpatch_no_such_library.a", "b"),
    ]
    watched = watch(targets, phase)
    assert not [module for module in sys.modules if module.startswith(name)]
    missing = {"absent: rlpatch_fake_engine.absent.deep:work", "absent: rlpatch_no_such_library.a:b"}
    assert set(not_timed(watched)) == missing
    import rlpatch_fake_engine.worker as worker  # type: ignore[import-not-found]

    assert worker.work() == 1 and calls == ["work"]
    assert set(not_timed(watched)) == missing | {"gone: rlpatch_fake_engine.worker:gone"}
    assert set(not_timed(watch(targets[1:2], phase))) == {"gone: rlpatch_fake_engine.worker:gone"}  # imported already


# ---- the command -----------------------------------------------------------------------------------------------------


def result(seconds: float, triton: dict[str, Any] | None = None, tokens: bool = True) -> dict[str, Any]:
    size = {"sequences": 2, "tokens": 8, "seconds": [0.5], "tokens_per_second": 32.0}
    return {
        "result": {
            "seconds": {START: seconds}, "phases": {"weights": 1.0, "triton": 0.5, "other": seconds - 1.5},
            "first_rollout_seconds": 0.1, "first_rollout_triton": triton, "triton": triton, "greedy": [[1], [2]],
            "rollouts": [size] if tokens else [], "compile": None,
            "collector": {"objects": 10, "full_collection_seconds": 0.1, "phases": {"capture": 0.25, "other": 0.5}},
        }
    }  # fmt: skip


def document(**settings: dict[str, list[Any]]) -> dict[str, Any]:
    return {
        "model": "tiny", "job": {"lora": 0, "max_num_seqs": 2}, "device": {"name": "CPU", "cores": 2},
        "versions": {"vllm": "1", "torch": "2"}, "settings": settings,
    }  # fmt: skip


def test_table_tells_medians_number_and_spread() -> None:
    kernels = {"seconds": 0.5, "compiled": 2, "cached": 0, "cached_seconds": 0.0, "largest": {"_a": 0.4, "_b": 0.1}}
    told = bench.table(
        document(
            default={"cold": [result(5.0, kernels), result(9.0), result(6.0)], "warm": []},
            quick={"cold": [result(4.0)], "warm": []},
        )
    )
    split = [re.split(r"\s{2,}", line.strip()) for line in told.splitlines()]
    rows = {cells[0].strip(): [cell.strip() for cell in cells[1:] if cell.strip()] for cells in split if cells}
    assert rows["engine start, cold, s"] == ["6.00 (5.00–9.00)", "4.00"]
    assert rows["of so many starts"] == ["3", "1"]
    assert rows["triton"] == ["0.50", "0.50"] and "triton" in PHASES
    assert rows["of all that: collector"] == ["0.75", "0.75"] and rows["in capture"] == ["0.25", "0.25"]
    assert "default, cold: Triton compiled 2 kernels in 0.50 s: _a 0.40, _b 0.10" in told


def test_a_table_of_starts_alone() -> None:
    told = bench.table(document(default={"cold": [result(5.0, tokens=False)], "warm": []}))
    assert "engine start, cold, s" in told and "tokens/s" not in told
    assert bench.parse(["--tokens", "0"]).tokens == ()


@pytest.mark.parametrize("end", ["Ctrl-C", "SIGTERM"])
def test_an_interrupted_run_keeps_and_shows_what_it_has(
    end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class FakeRunner(bench.Runner):  # processes that start no engine
        def prepare(self, environments: Any, title: str) -> None:
            pass

        def run(self, job: Any, title: str, timeout: float | None = None) -> dict[str, Any]:
            self.count += 1
            if self.count < 3:
                return result(float(self.count))
            if end == "SIGTERM":
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)
            raise KeyboardInterrupt

    monkeypatch.setattr(bench, "Runner", FakeRunner)
    monkeypatch.setattr(bench, "device_facts", lambda: {"cuda": False, "name": "CPU"})
    monkeypatch.setattr(bench, "checkpoint", lambda *given: "folder")
    monkeypatch.setattr("rlpatch.versions.installed", lambda name: SimpleNamespace(present=True, version="1"))
    out = tmp_path / "starts.json"
    before = signal.getsignal(signal.SIGTERM)
    assert bench.main(["--settings", "default,quick", "--cold", "--repeat", "2", "--out", str(out)]) == 1
    assert signal.getsignal(signal.SIGTERM) is before
    said = capsys.readouterr()
    assert "interrupted" in said.err and "engine start, cold, s" in said.out and str(out) in said.out
    written = json.loads(out.read_text())
    assert {"rlpatch", "python", "vllm", "torch", "triton"} <= set(written["versions"])
    assert written["device"]["name"] == "CPU" and written["device"]["cores"] and "environment" in written
    kept = written["settings"]
    assert [run["result"]["seconds"][START] for name in kept for run in kept[name]["cold"]] == [1.0, 2.0]


def test_no_start_begins_after_the_time_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class FakeRunner:
        waiting = 1
        done = 0

        def run(self, job: Any, title: str) -> dict[str, Any]:
            FakeRunner.done += 1
            time.sleep(0.03)
            return result(1.0)

    options = bench.parse(["--settings", "default,quick", "--cold", "--repeat", "2", "--minutes", "0.0001"])
    made = document(**{name: {"cold": [], "warm": []} for name in options.settings})
    job = bench.StartJob("", "folder")
    said = bench._measure(options, made, tmp_path / "a.json", FakeRunner(), job, tmp_path)  # type: ignore[arg-type]
    assert said == "0.0001 minutes are over after 1 of 4 turns" and FakeRunner.done == 1
