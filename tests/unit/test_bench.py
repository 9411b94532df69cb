"""The bench's own arithmetic and its conduct around processes; no torch."""

from __future__ import annotations

import gc
import json
import os
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlpatch.bench import command, in_turn, plot, processes, report, shapes, sweep
from rlpatch.bench.collector_clock import CollectorClock
from rlpatch.bench.memory_watch import Clock, Interval, decimate, innermost_over_time, memory_by_phase, timeline
from rlpatch.bench.processes import Runner
from rlpatch.bench.run import (
    TOO_LONG,
    VARIANTS,
    BenchJob,
    Variant,
    is_out_of_memory,
    means,
    medians,
    told_job,
    variant_of,
    without_folders,
)
from rlpatch.bench.sweep import Attempt

GIB = 2**30


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--variants", "trl,other"], "unknown 'other'"),
        (["--variants", "trl:standby=no"], "settings are for rlpatch's variants"),
        (["--variants", "rlpatch:stanby=no"], "stanby=no is no setting"),
        (["--variants", ","], "known are trl, trl-sleep, rlpatch"),
        (["--variants", "trl,trl"], "--repeat"),
        (["--steps", "2"], "--warmup 2: leaves none of 2 steps"),
        (["--completions", "1"], "--completions 1: at least 2"),
        (["--micro-batch", "3"], "--micro-batch 3: does not divide --completions 8"),
        (["--utilization", "1.5"], "--utilization 1.5: between 0 and 1"),
        (["--kv-gib", "0"], "--kv-gib 0.0: more than 0"),
        (["--sweep-utilization", "0.3,x"], "--sweep-utilization"),
        (["--sweep-max", "100"], "--sweep-max 100: less than --sweep-step 512"),
        (["--sweep-start", "100"], "--sweep-start 100: between"),
        (["--sweep-utilization", "0.3:0.4:0.5:0.6"], "--sweep-utilization 0.3:0.4:0.5:0.6: one list, or with colons"),
        (["--rollout-tokens", "0"], "--rollout-tokens 0: at least 1"),
        (["--sweep-start", "512,x"], "--sweep-start 512,x: numbers"),
        (["--sweep-start", "512,512"], "--sweep-start 512,512: one number, or one for each of trl, trl-sleep, rlpatch"),
        (["--random-weights", "--precision", "script"], "--random-weights: with --shape"),
        (["--plan", "--kv-gib", "2"], "--plan: without --kv-gib"),
        (["--grow-from", "300"], "--grow-from 300: more than --completion-tokens 256"),
        (["--model", "/nowhere"], "--model /nowhere: no such checkpoint folder"),
        (["--shape", "9b"], "invalid choice"),
        (["--in-turn", "standby"], "invalid choice"),
        (["--in-turn", "detokenize", "--steps", "5"], "--in-turn detokenize: needs 4 measured steps"),
        (["--in-turn", "detokenize", "--sweep-context"], "--in-turn detokenize: needs 4 measured steps and no sweep"),
        (["--in-turn", "detokenize", "--variants", "trl"], "--in-turn detokenize: none of the variants"),
        (["--name", "a/b"], "--name a/b: a file name without folders"),
    ],
)
def test_wrong_options_end_with_status_2(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_defaults() -> None:
    options = command.parse([])
    job = command.job_from(options, "folder")
    assert options.variants == ["trl", "trl-sleep", "rlpatch"]
    assert command.parse(["--lora", "8"]).variants == ["trl", "trl-sleep", "rlpatch-fold", "rlpatch-slots"]
    assert (job.completions, job.micro_batch, job.utilization, job.kv_bytes) == (8, 8, 0.5, None)
    with_kv = command.job_from(command.parse(["--kv-gib", "2"]), "folder")
    assert with_kv.kv_bytes == 2 * GIB
    assert with_kv.utilization < 0.1  # it only gates the engine's start then
    assert command.job_from(command.parse(["--kv-gib", "2", "--utilization", "0.4"]), "").utilization == 0.4


def test_utilizations_are_tried_for_variants_of_trl() -> None:
    assert command.parse(["--sweep-utilization", "0.3,0.4:0.5"]).sweep_utilization == {
        "trl": [0.3, 0.4], "trl-sleep": [0.5],
    }  # fmt: skip
    assert command.parse(["--variants", "rlpatch,trl"]).sweep_utilization == {"trl": [0.3, 0.5, 0.7, 0.9]}
    assert command.parse(["--variants", "rlpatch"]).sweep_utilization == {}
    alone = command.parse(["--variants", "rlpatch", "--sweep-utilization", "0.75"]).sweep_utilization
    assert alone == {"rlpatch": [0.75]}
    chosen = command.parse(["--variants", "rlpatch,trl", "--sweep-utilization", "0.7:0.3,0.4"]).sweep_utilization
    assert chosen == {"rlpatch": [0.7], "trl": [0.3, 0.4]}


def test_plan_is_for_rlpatch_s_variants(tmp_path: Path) -> None:
    seen: list[tuple[str, float]] = []

    class Instead:
        def run(self, job: BenchJob, title: str) -> dict[str, Any]:
            seen.append((job.variant, job.utilization))
            return {"skipped": "here"}

    options = command.parse(["--plan", "--variants", "trl,rlpatch,rlpatch:park_optimizer=yes", "--utilization", "0.4"])
    document = {"job": {"lora": 0, "precision": "object", "completions": 8, "completion_tokens": 256}, "model": "x",
                "device": {"name": "CPU", "emulated_gib": None}, "versions": {"vllm": "0", "trl": "0"}}  # fmt: skip
    command._compare(options, command.job_from(options, ""), Instead(), document, tmp_path / "x.json")  # type: ignore[arg-type]
    assert seen == [("trl", 0.4), ("rlpatch", 0.0), ("rlpatch:park_optimizer=yes", 0.0)]


def test_completions_grow_evenly_to_the_longest() -> None:
    job = command.job_from(command.parse(["--grow-from", "16", "--completion-tokens", "100", "--steps", "4"]), "")
    assert job.step_tokens == [16, 44, 72, 100]
    assert command.job_from(command.parse(["--completion-tokens", "100"]), "").step_tokens is None


@pytest.mark.parametrize("change", ["defaults=yes", "lora=slots", "one_forward=no"])
def test_what_a_variant_s_name_sets_is_in_force(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """rlpatch takes a variable only where nothing was passed, so a name's setting may not be passed as well."""
    from rlpatch.settings import resolve

    def settings(variant: Variant) -> Any:
        names = ("standby", "share_weights", "defaults", "lora", "include", "exclude", "strict")
        given = {**dict.fromkeys(names), **(variant.apply or {})}
        return resolve(**given, known=("standby", "one_forward", "fold"))

    plain, variant = settings(VARIANTS["rlpatch-fold"]), variant_of(f"rlpatch-fold:{change}")
    for name, value in variant.environment.items():
        monkeypatch.setenv(name, value)
    changed = settings(variant)
    assert plain != changed
    assert getattr(changed, change.split("=")[0]) == {"yes": True, "no": False, "slots": "slots"}[change.split("=")[1]]


def test_results_do_not_say_where_a_machine_keeps_things() -> None:
    argv = ["--shape", "8b", "--models", "/a/b", "--out=/c", "--logs", "--models", "--name", "x y"]
    assert report.said(argv) == "--shape 8b --name 'x y'"
    told = told_job(BenchJob(variant="trl", model="/a/b/8b-bf16", output="/tmp/x"))
    assert told["model"] == "8b-bf16" and "output" not in told


def test_order_alternates() -> None:
    assert command.order(["a", "b", "c"], 3) == list("abccbaabc")


# ---- the search ------------------------------------------------------------------------------------------------------


def oracle(limit: int, rounds: list[list[int]], engine: int = 10**9) -> Any:
    """Trains up to `limit` tokens; engines cannot be built for more than `engine`."""

    def trial(lengths: list[int]) -> list[Attempt]:
        rounds.append(lengths)
        assert lengths == sorted(set(lengths)) and len(lengths) <= 8
        if lengths[-1] > engine:
            return [Attempt(lengths[-1], False)]
        passed = [Attempt(tokens, True) for tokens in lengths if tokens <= limit]
        return [*passed, *(Attempt(tokens, False) for tokens in lengths[len(passed) :][:1])]

    return trial


LIMITS = (0, 511, 512, 1023, 1024, 5000, 77_777, 131_071, 131_072, 10**9)


@pytest.mark.parametrize("engine", [10**9, 60_000, 700])
@pytest.mark.parametrize("first", [0, 512, 4096, 100_000])
@pytest.mark.parametrize(
    ("limit", "known"), [(limit, known) for limit in LIMITS for known in (0, 512, 4096) if known <= limit]
)
def test_search_finds_the_longest_multiple(limit: int, known: int, first: int, engine: int) -> None:
    rounds: list[list[int]] = []
    best, attempts, complete = sweep.longest(
        oracle(limit, rounds, engine), step=512, most=131_072, first=first, known=known
    )
    assert complete
    assert best == max(known, min(limit, 131_072, engine) // 512 * 512)
    tried = [attempt.tokens for attempt in attempts]
    assert len(tried) == len(set(tried)) and len(rounds) <= 16


def test_settings_that_do_no_better_cost_one_trial() -> None:
    rounds: list[list[int]] = []
    best, attempts, _ = sweep.longest(oracle(5000, rounds), step=512, most=131_072, known=8192)
    assert best == 8192
    assert [attempt.tokens for attempt in attempts] == [8704]


def test_a_good_guess_costs_one_process() -> None:
    rounds: list[list[int]] = []
    assert sweep.longest(oracle(43_100, rounds), step=2048, most=131_072, first=38_912)[0] == 43_008
    assert rounds == [[38_912 + 2048 * i for i in range(8)]]


@pytest.mark.parametrize(("limit", "expected"), [
    (41_000, [38_912, 40_960, 43_008]),
    (37_000, [38_912, 40_960, 43_008]),  # and then what is below these
])  # fmt: skip
def test_after_a_guess_that_fails_come_the_lengths_just_below(limit: int, expected: list[int]) -> None:
    rounds: list[list[int]] = []
    best, _, complete = sweep.longest(oracle(limit, rounds), step=2048, most=131_072, first=45_056)
    assert rounds[1] == expected and complete and best == limit // 2048 * 2048
    assert limit > 38_912 or rounds[2][0] == 26_624


@pytest.mark.parametrize("ends", [1, 2, 3])
@pytest.mark.parametrize("limit", [30_000, 43_100, 70_000])
def test_an_interrupted_search_goes_on_where_it_was(limit: int, ends: int) -> None:
    whole: list[list[int]] = []
    best, _, _ = sweep.longest(oracle(limit, whole), step=2048, most=131_072, first=38_912)
    rounds: list[list[int]] = []
    _, tried, complete = sweep.longest(
        oracle(limit, rounds), step=2048, most=131_072, first=38_912, in_time=lambda: len(rounds) < ends
    )
    again = sweep.longest(oracle(limit, rounds), step=2048, most=131_072, first=38_912, tried=tried)
    assert again[0] == best and again[2]
    assert again[1][: len(tried)] == tried
    tokens = [attempt.tokens for attempt in again[1]]
    assert len(tokens) == len(set(tokens))
    assert complete or len(rounds) > ends


def sweep_document(**changes: Any) -> dict[str, Any]:
    searches = {"trl": {"best": 512, "utilization": 0.3, "kv": None, "complete": True, "skipped": None, "attempts": []}}
    return {
        "date": "d", "command": "c", "model": "tiny", "environment": {}, "versions": {"vllm": "0.25.1"},
        "job": {"lora": 32, "completion_tokens": 256}, "device": {"name": "CPU"},
        "sweep": {"step": 512, "most": 4096, "variants": searches}, **changes,
    }  # fmt: skip


SWEEP = ["--sweep-context", "--sweep-max", "4096", "--name", "x", "--resume"]


def test_a_sweep_of_the_same_is_resumed(tmp_path: Path) -> None:
    path, mine = tmp_path / "x.json", sweep_document(sweep={}, job={"lora": 32, "completion_tokens": 9})
    options = command.parse([*SWEEP, "--variants", "trl"])
    assert sweep.begun(mine, options, path) == {}
    report.write_json(sweep_document(), path)
    assert sweep.begun(mine, options, path)["trl"]["best"] == 512
    assert mine["resumed"] == [{"date": "d", "command": "c"}]


def test_a_sweep_from_before_a_field_s_time_is_resumed(tmp_path: Path) -> None:
    """`profile` came after the first results; they were made with its default."""
    path, options = tmp_path / "x.json", command.parse([*SWEEP, "--variants", "trl"])
    report.write_json(sweep_document(), path)
    job = {"lora": 32, "completion_tokens": 9}
    assert sweep.begun(sweep_document(job={**job, "profile": False}), options, path)["trl"]["best"] == 512
    with pytest.raises(processes.BenchError, match="profile: False there, True here"):
        sweep.begun(sweep_document(job={**job, "profile": True}), options, path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"versions": {"vllm": "0.26.0"}}, "vllm: 0.26.0 there, 0.25.1 here"),
        ({"job": {"lora": 16}}, "lora: 16 there, 32 here"),
        ({"device": {"name": "H200"}}, "name: H200 there, CPU here"),
        ({"environment": {"VLLM_X": "1"}}, "environment: {'VLLM_X': '1'} there, {} here"),
        ({"sweep": {"step": 64, "most": 4096, "variants": {}}}, "step: 64 there, 512 here"),
        ({"sweep": None}, "holds no sweep"),
    ],
)
def test_a_sweep_of_something_else_is_not_resumed(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    report.write_json(sweep_document(**changes), tmp_path / "x.json")
    with pytest.raises(processes.BenchError, match=re.escape(said)):
        sweep.begun(sweep_document(), command.parse([*SWEEP, "--variants", "trl"]), tmp_path / "x.json")


def test_the_model_s_folder_is_not_told() -> None:
    told = without_folders({"precision": [{"model": "/a/b", "cost": 2}], "x": ("/a/b", "/a")}, "/a/b")
    assert told == {"precision": [{"model": "b", "cost": 2}], "x": ["b", "/a"]}


def test_the_environment_is_told_without_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.setenv("VLLM_CACHE_ROOT", "/somewhere")
    told = report.told_environment()
    assert told["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True" and "VLLM_CACHE_ROOT" not in told


def test_search_ends_with_the_time() -> None:
    rounds: list[list[int]] = []
    best, _, complete = sweep.longest(oracle(10**9, rounds), step=512, most=131_072, in_time=lambda: len(rounds) < 2)
    assert (best, complete) == (6144, False)
    assert rounds == [[512, 1024, 1536], [2048, 2560, 3072, 3584, 4096, 5120, 6144]]


def test_a_process_without_time_for_all_of_it_ends_the_search() -> None:
    def trial(lengths: list[int]) -> list[Attempt]:
        return [Attempt(tokens, True) for tokens in lengths[:2]]

    best, attempts, complete = sweep.longest(trial, step=512, most=131_072, first=1024)
    assert (best, len(attempts), complete) == (1536, 2, False)


def run_of(rows: int, **found: Any) -> dict[str, Any]:
    return {"rows": [{"seconds": 1.0, "generated": 6, "trained": 8.0}] * rows, "engine": {"tokens": 64}, **found}


def memory_out(stage: str, phase: str | None = None) -> dict[str, Any]:
    return {"error": {"text": "CUDA out of memory", "stage": stage, "phase": phase, "out_of_memory": True}}


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (run_of(4, result={}), [(1, True), (2, True), (3, True)]),
        (run_of(2, **memory_out("train", "train")), [(1, True), (2, True), (3, False)]),
        (run_of(0, **memory_out("train", "train")), [(1, False)]),
        (run_of(0, **memory_out("rollout", "restore")), [(1, False)]),
        # what the training of 2 left behind is in the way of a rollout
        (run_of(2, **memory_out("rollout", "restore")), [(1, True), (2, False)]),
        (run_of(2, **memory_out("train", "sync")), [(1, True), (2, False)]),
        # nothing is in the way but the length
        (run_of(2, **memory_out(TOO_LONG, "rollout")), [(1, True), (2, True), (3, False)]),
        (run_of(0, **memory_out(TOO_LONG, "rollout")), [(1, False)]),
        # the longest, once more
        (run_of(3, **memory_out("rollout", "restore")), [(1, True), (2, True), (3, False)]),
        (run_of(3, **memory_out("train", "train")), [(1, True), (2, True), (3, False)]),
        # the engine is built for the longest
        (run_of(0, **memory_out("engine start")), [(3, False)]),
        ({"skipped": "no sleep mode"}, []),
        # ended for its time: of 2 it is not known whether a rollout could follow
        (run_of(2, error={"text": "no result after 9 s", "stage": "train", "phase": None, "late": True}), [(1, True)]),
        (run_of(0, error={"text": "no result after 9 s", "stage": "train", "phase": None, "late": True}), []),
    ],
)
def test_what_a_process_of_several_lengths_says(run: dict[str, Any], expected: list[tuple[int, bool]]) -> None:
    attempts = sweep.attempts_of([1, 2, 3], run)
    assert [(attempt.tokens, attempt.ok) for attempt in attempts] == expected
    assert all(attempt.detail and attempt.detail["kv"] == {"tokens": 64} for attempt in attempts)


# ---- clock and memory ------------------------------------------------------------------------------------------------


def test_clock_counts_each_second_once() -> None:
    clock = Clock()
    clock.step = 0
    with clock.phase("rollout"):
        time.sleep(0.01)
        with clock.phase("generate"):
            time.sleep(0.02)
            with clock.phase("generate"):  # the same name again is the same phase
                assert clock.innermost == "generate"
    own = clock.seconds(0)
    outer = next(i for i in clock.intervals if i.name == "rollout")
    assert [i.name for i in clock.intervals] == ["generate", "rollout"]
    assert own["rollout"] + own["generate"] == pytest.approx(outer.end - outer.start)
    assert own["generate"] >= 0.02 and own["rollout"] >= 0.01
    assert clock.seconds(1) == {}
    assert clock.innermost == "train"


def test_the_collector_s_seconds_by_step_and_phase() -> None:
    clock = Clock()
    collector = CollectorClock(clock)
    gc.disable()  # but for what is asked for here
    collector.start()
    try:
        clock.step = 1
        gc.collect()
        with clock.phase("rollout"), clock.phase("generate"):
            gc.collect()
            gc.collect(0)
    finally:
        collector.stop()
        gc.enable()
    gc.collect()
    found = collector.of(1)
    assert found["full"] == 2 and 0 < found["generate"] < found["seconds"] < 10
    assert collector.of(0) == {"seconds": 0, "generate": 0, "full": 0}
    assert set(collector.by_phase) == {"train", "generate"}
    assert sum(collector.by_phase.values()) == pytest.approx(found["seconds"])


def test_means_tell_what_comes_now_and_then() -> None:
    rows = result(2.0)["steps"][1:]
    assert means(rows) == pytest.approx(
        {"tokens_per_second": 2048, "collector": 0.4 / 3, "collector_generating": 0.2 / 3}
    )
    assert set(means([]).values()) == {None}


def test_clock_names_the_innermost_phase_that_failed() -> None:
    calls: list[str] = []
    clock = Clock(lambda: calls.append("synchronize"))
    with pytest.raises(MemoryError), clock.phase("rollout"), clock.phase("restore"):
        raise MemoryError
    assert clock.failed_in == "restore"
    assert [i.name for i in clock.intervals] == ["restore", "rollout"]
    assert len(calls) == 2  # at the beginnings; a failed device is not asked again


INTERVALS = [
    Interval("sync", 1.0, 2.0, 1.0, 0, 0),
    Interval("generate", 3.0, 4.0, 1.0, 1, 0),
    Interval("release", 4.0, 5.0, 1.0, 1, 0),
    Interval("rollout", 2.0, 5.0, 1.0, 0, 0),
]


def test_innermost_over_time() -> None:
    changes = innermost_over_time(INTERVALS)
    assert [name for _, name in changes if _ > 0][-1] == "train"
    by_phase = memory_by_phase(
        [(0.5, 1), (1.5, 2), (2.5, 3), (3.5, 4), (4.5, 5), (5.5, 6), (9.0, 99)], INTERVALS, 0.0, 8.0
    )
    assert {name: (row["min"], row["max"]) for name, row in by_phase.items()} == {
        "train": (1, 6), "sync": (2, 2), "rollout": (3, 3), "generate": (4, 4), "release": (5, 5),
    }  # fmt: skip


def test_decimation_keeps_extremes() -> None:
    samples = [(float(i), 1000 if i == 777 else 0 if i == 4242 else 500) for i in range(10_000)]
    kept = decimate(samples, 100)
    assert len(kept) <= 100
    assert {used for _, used in kept} == {0, 500, 1000}
    assert kept == sorted(kept)
    assert decimate(samples[:50], 100) == samples[:50]
    found = timeline(samples, INTERVALS, origin=0.0, training=5000.0)
    assert len(found["seconds"]) == len(found["mib"]) <= 2000
    assert [phase[0] for phase in found["phases"]] == ["sync", "rollout", "generate", "release"]


# ---- figures ---------------------------------------------------------------------------------------------------------


def result(step: float, warmup: int = 1, peak: int = 10 * GIB) -> dict[str, Any]:
    seconds = {"sync": 0.1, "restore": 0.01, "generate": 1.0, "release": 0.02, "rollout": 0.0, "train": step - 1.13}
    rows = [
        {
            "seconds": {**seconds, "step": step if i >= warmup else 99.0},
            "tokens": 2048,
            "tokens_per_second": 2048.0,
            "after_release": {"used": 4 * GIB},
            "collector": {"seconds": 0.2 * (i % 2), "generate": 0.1 * (i % 2), "full": i % 2},
            "metrics": {"logp_difference": 0.01 * (i + 1)},
        }
        for i in range(warmup + 3)
    ]
    return {
        "job": {"warmup": warmup},
        "steps": rows,
        "kv": {"bytes": 2 * GIB, "blocks": 128, "block_size": 16, "tokens": 2048},
        "seconds": {"engine_start": 15.0},
        "engine_cache": {"was_empty": False, "grew": False},
        "memory": {
            "by_phase": {"train": {"max": peak, "min": 1, "samples": 3}, "generate": {"max": peak, "min": 2, "samples": 3}},
            "peak": peak,
            "after_release": 4 * GIB,
            "engine_held": GIB // 2,
            "load": {"before": 0, "weights": GIB, "peak_above": GIB, "seconds": 1.0},
        },
        "timeline": {
            "seconds": [0.0, 1.0, 2.0], "mib": [1.0, 2.0, 1.0], "phases": [["generate", 0.5, 1.0, 0, 1]],
            "training": 0.0, "steps": [[0.0, 0.4], [0.4, 2.0]], "warmup": 1,
        },
    }  # fmt: skip


def document(**variants: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": "n", "model": "8b", "job": {"lora": 0, "precision": "object", "completions": 8, "completion_tokens": 256},
        "device": {"name": "GPU", "emulated_gib": 80.0}, "versions": {"vllm": "0", "trl": "1"}, "variants": variants,
    }  # fmt: skip


def test_medians_leave_warmup_out_and_scale_by_kv() -> None:
    found = report.summarize([result(2.0), result(4.0, peak=12 * GIB)])
    assert found is not None
    assert found["measured_steps"] == 6
    assert found["median"]["step"] == 3.0
    assert found["median"]["release_ms_per_gib"] == pytest.approx(10.0)
    assert found["median"]["restore_ms_per_gib"] == pytest.approx(5.0)
    assert found["median"]["logp_difference"] == pytest.approx(0.03)
    assert found["memory"]["by_phase"]["train"] == {"max": 12 * GIB, "min": 1}
    assert report.summarize([]) is None
    assert medians([], None) == {}


def test_steps_in_turn_are_compared_and_kept_apart() -> None:
    assert [in_turn.is_without(step) for step in range(6)] == [False, True, True, False, False, True]
    found = result(2.0)
    found["job"]["in_turn"] = "detokenize"
    for row, seconds in zip(found["steps"][1:], (1.0, 4.0, 1.2), strict=True):
        row["seconds"] = {**row["seconds"], "generate": seconds, "restore": 0.001}
    for step, row in enumerate(found["steps"]):
        row |= {"without": "detokenize"} if in_turn.is_without(step) else {}
    summary = report.summarize([found, found])
    assert summary is not None
    turns = summary["in_turn"]
    assert (turns["with"]["steps"], turns["without"]["steps"]) == (2, 4)
    assert turns["with"]["seconds"]["generate"] == {"median": 1.2, "lower": 1.2, "upper": 1.2}
    assert turns["without"]["seconds"]["generate"] == {"median": 2.5, "lower": 1.0, "upper": 4.0}
    assert summary["median"]["generate"] == 1.2 and summary["measured_steps"] == 2
    text = report.table(document(rlpatch={"runs": [{"result": found}], "summary": summary}))
    assert "rlpatch, detokenize in turn: 2 steps with it, 4 without; median (quartiles)" in text
    assert "generate, s: 1.2000 (1.2000–1.2000) with, 2.5000 (1.0000–4.0000) without: 0.480 ×" in text
    assert "restore, s: 0.0010 (" not in text
    assert in_turn.compare("detokenize", found["steps"][1:3]) is None  # one side only


def test_table_holds_every_fate() -> None:
    error = {"text": "OutOfMemoryError: CUDA out of memory", "stage": "train", "phase": None, "out_of_memory": True}
    base, fast = result(2.0), result(1.5)
    text = report.table(
        document(
            **{
                "trl": {"runs": [{"result": base}], "summary": report.summarize([base])},
                "trl-sleep": {"runs": [{"skipped": "no sleep mode here"}], "summary": None},
                "rlpatch": {"runs": [{"result": fast}], "summary": report.summarize([fast])},
                "other": {"runs": [{"error": error, "log": ["last words"]}], "summary": None},
            }
        )
    )
    assert max(map(len, text.splitlines())) <= 100
    assert "emulating 80 GiB" in text
    ratio = next(line for line in text.splitlines() if line.startswith("step, × trl "))
    assert ratio.split()[3:] == ["1.000", "skipped", "0.750", "failed"]
    assert "trl-sleep skipped: no sleep mode here" in text
    assert "other failed: out of memory in train" in text and "last words" in text
    assert "128 × 16" in text and "15.0" in text


def test_json_is_strict_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    report.write_json({"a": float("nan"), "b": [float("inf"), 1], "c": (1, 2)}, path)
    assert json.loads(path.read_text()) == {"a": None, "b": [None, 1], "c": [1, 2]}
    assert list(tmp_path.iterdir()) == [path]


def test_out_of_memory_in_three_languages() -> None:
    assert is_out_of_memory("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB")
    assert is_out_of_memory("the KV cache cannot be restored: …")
    assert is_out_of_memory("(9 GiB KV cache is needed, which is larger than the available KV cache memory (1 GiB)")
    assert not is_out_of_memory("ValueError: no such layer")


def test_plot_without_matplotlib_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    runs = {"trl": {"runs": [{"result": result(2.0)}]}}
    problem = plot.draw(document(**runs), tmp_path / "x.png")
    assert problem is not None and "matplotlib is not installed" in problem
    assert plot.draw(document(trl={"runs": []}), tmp_path / "x.png") == "no variant has a timeline"


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    runs = {name: {"runs": [{"result": result(2.0)}]} for name in ("trl", "rlpatch")}
    assert plot.draw(document(**runs), tmp_path / "x.png") is None
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"


def test_plot_of_a_sweep(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = sweep_document(name="x", device={"name": "H200", "emulated_gib": 80})
    assert plot.draw(found, tmp_path / "x.png") == "no variant has trained a length"
    found["sweep"]["variants"]["trl"].update(
        kv={"bytes": 4 << 30},
        attempts=[
            {"utilization": 0.3, "tokens": 512, "ok": True, "detail": {"memory_peak": 70 << 30}},
            {"utilization": 0.3, "tokens": 1024, "ok": False, "detail": None, "reason": "full"},
            {"utilization": 0.7, "tokens": 256, "ok": False, "detail": None, "reason": "fuller"},
        ],
    )
    assert plot.draw(found, tmp_path / "x.png") is None
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    assert sweep.sweep_table(found).splitlines()[-2:] == ["trl: 1024 tokens: full", "trl: 256 tokens at 0.7: fuller"]


# ---- processes -------------------------------------------------------------------------------------------------------

JOB = BenchJob(variant="trl", model="m")


def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, before: str = "") -> Runner:
    """A runner whose process runs `body` instead of the bench, with its job, and `before` it has one."""
    lines = f"import json, os, sys, time\n{before}job = json.load(sys.stdin)\n{body}"
    (tmp_path / "bench_child.py").write_text(lines)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return Runner(tmp_path / "scratch", None, timeout=30, module="bench_child")


def test_result_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = "print('noise'); print(json.dumps({'stage': 'train'})); print(json.dumps({'result': {'got': job['model']}}))"
    run = child(tmp_path, monkeypatch, body).run(JOB, "t")
    assert run["result"] == {"got": "m"} and "error" not in run


WAITS = """
print(json.dumps({"result": {"model": job["model"], "ahead": "--ahead" in sys.argv, "x": os.environ.get("X")}}))
print("said", file=sys.stderr)
"""


def test_processes_prepared_take_the_jobs_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = "print(json.dumps({'ready': True}), flush=True)\n"
    with child(tmp_path, monkeypatch, WAITS, before=ready) as runner:
        runner.prepare([{"X": "1"}, {"X": "2"}], "two")
        assert runner.waiting == 2
        seen = [runner.run(replace(JOB, model=name), name)["result"] for name in "abc"]
        runner.prepare([{}], "one too many")
        process = runner._waiting[0][0]
    assert seen == [
        {"model": "a", "ahead": True, "x": "1"}, {"model": "b", "ahead": True, "x": "2"},
        {"model": "c", "ahead": False, "x": None},
    ]  # fmt: skip
    assert process.poll() is not None and runner.waiting == 0
    logs = sorted(runner.logs.glob("*.log"))
    assert [path.name for path in logs] == [f"0{number}-trl.{os.getpid()}.log" for number in (1, 2, 3)]
    assert [path.read_text() for path in logs] == ["said\n"] * 3


def test_benches_that_share_a_folder_of_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As two processes, of which the second gets its own number here."""
    with child(tmp_path, monkeypatch, WAITS) as one, child(tmp_path, monkeypatch, WAITS) as other:
        own = os.getpid()
        one._start({})
        with monkeypatch.context() as patched:
            patched.setattr(os, "getpid", lambda: own + 1)
            other._start({})
            assert other.run(JOB, "t")["result"]["ahead"]
        assert one.run(JOB, "t")["result"]["ahead"]
        one._start({})
    assert sorted(path.name for path in one.logs.glob("*")) == [f"01-trl.{own}.log", f"01-trl.{own + 1}.log"]


def test_the_next_process_starts_while_one_is_at_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with child(tmp_path, monkeypatch, WAITS) as runner:
        runner.ahead = True
        seen = [runner.run(JOB, "t")["result"]["ahead"] for _ in range(2)]
        assert seen == [False, True] and runner.waiting == 1


def test_a_job_that_comes_late_finds_the_imports_done(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    from rlpatch.bench.run import read_job

    said = io.StringIO()
    monkeypatch.setattr(sys, "__stdout__", said)
    for arguments in (["x"], ["x", "--ahead"]):
        monkeypatch.setattr(sys, "argv", arguments)
        monkeypatch.setattr(sys, "stdin", io.StringIO('{"model": "m"}'))
        assert read_job() == {"model": "m"}
    assert said.getvalue() == '{"ready": true}\n'


def test_error_keeps_the_last_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = (
        "print('boom', file=sys.stderr)\n"
        "print(json.dumps({'error': {'text': 'X: y', 'stage': 'train', 'phase': 'sync', 'out_of_memory': False}}))\n"
        "sys.exit(1)"
    )
    run = child(tmp_path, monkeypatch, body).run(JOB, "t")
    assert processes.failure(run["error"]) == "X: y in sync"
    assert run["log"] == ["boom"]


def test_death_by_signal_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = "print(json.dumps({'stage': 'engine start'}), flush=True); os.kill(os.getpid(), 11)"
    run = child(tmp_path, monkeypatch, body).run(JOB, "t")
    assert run["error"]["text"] == "killed by SIGSEGV"
    assert run["error"]["stage"] == "engine start"
    assert not run["error"]["out_of_memory"]


def test_death_that_can_only_be_read_from_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = child(tmp_path, monkeypatch, "print('CUDA Error: out of memory', file=sys.stderr); os._exit(3)").run(JOB, "t")
    assert run["error"]["text"] == "the process ended with status 3"
    assert run["error"]["out_of_memory"]


def test_a_stuck_process_is_ended_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = "import subprocess; subprocess.Popen(['sleep', '60']); time.sleep(60)"
    start = time.monotonic()
    run = child(tmp_path, monkeypatch, body).run(JOB, "t", timeout=1.5)
    assert time.monotonic() - start < 20
    assert run["error"]["text"] == "no result after 2 s" and not run["error"]["out_of_memory"]


def test_shape_marker(tmp_path: Path) -> None:
    assert not shapes.present("8b", tmp_path)
    (tmp_path / "rlpatch-shape.json").write_text(json.dumps(shapes._identity("8b")))
    assert shapes.present("8b", tmp_path) and not shapes.present("4b", tmp_path)
    assert shapes.write("8b", tmp_path) is False  # nothing is made, nothing heavy imported
    assert shapes.main(["9b", str(tmp_path)]) == 2
