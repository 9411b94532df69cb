"""One small run of the bench on real vLLM and TRL."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.cpu, pytest.mark.timeout(600)]


def test_bench_on_the_tiny_shape(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "rlpatch", "bench", "--shape", "tiny", "--variants", "trl,trl-sleep,rlpatch",
        "--steps", "3", "--warmup", "1", "--prompt-tokens", "8", "--completion-tokens", "16", "--kv-gib", "0.125",
        "--eager", "--models", str(tmp_path / "models"), "--out", str(tmp_path), "--name", "run", "--profile",
    ]  # fmt: skip
    answer = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "step, × trl" in answer.stdout and "a decode step: " in answer.stdout
    document = json.loads((tmp_path / "run.json").read_text())
    assert document["schema"] == 1 and document["versions"]["vllm"] and document["device"]["name"] == "CPU"
    variants = document["variants"]
    assert "skipped" in variants["trl-sleep"]["runs"][0]
    for name in ("trl", "rlpatch"):
        result = variants[name]["runs"][0]["result"]
        assert len(result["steps"]) == 3
        assert result["kv"]["bytes"] == 128 << 20 and result["kv"]["blocks"] > 0
        for step in result["steps"]:
            seconds = step["seconds"]
            assert seconds["step"] == pytest.approx(sum(v for k, v in seconds.items() if k != "step"))
            assert seconds["sync"] > 0 and seconds["generate"] > 0 and seconds["train"] > 0
            assert step["tokens"] == 8 * 16  # every completion has its full length
            assert step["metrics"]["logp_difference"] < 2e-6
            assert step["metrics"]["grad_norm"] > 0
        assert {"sync", "generate", "train"} <= set(result["memory"]["by_phase"])
        profile = result["profile"]  # of a fourth and a fifth step
        phases = profile["phases"]
        parts = {"generate", "log-probs", "backward", "clipping", "optimizer", "rewards", "logging"}
        assert parts <= set(phases) and profile["decode_steps"] == 16
        assert sum(found["seconds"] for found in phases.values()) == pytest.approx(profile["seconds"])
        host = {one["function"]: one for one in profile["host"]["generate"]}
        steps = max(one["called"] for name, one in host.items() if name.endswith("execute_model"))
        assert 0 < steps < profile["host_seconds"]["generate"] and parts <= set(profile["host_seconds"])
        for name in ("generate", "log-probs", "backward"):
            assert 0 < phases[name]["busy"] <= phases[name]["seconds"] and phases[name]["kernels"], name
        assert any("mm" in one["name"] for one in phases["backward"]["kernels"])
        assert len(result["timeline"]["seconds"]) <= 2000
    trl, ours = (variants[name]["runs"][0]["result"] for name in ("trl", "rlpatch"))
    assert all(step["seconds"]["release"] > 0 and step["seconds"]["restore"] > 0 for step in ours["steps"])
    assert all(step["seconds"]["release"] == 0 for step in trl["steps"])
    assert [s["metrics"]["loss"] for s in ours["steps"]] == pytest.approx(
        [s["metrics"]["loss"] for s in trl["steps"]],
        abs=2e-5,  # one forward pass less rounds otherwise
    )
    summary = variants["rlpatch"]["summary"]
    assert summary["measured_steps"] == 2 and summary["median"]["release_ms_per_gib"] > 0
    # 128 MiB of KV cache come and go; blocks under 32 MiB glibc may keep to itself
    by_phase = summary["memory"]["by_phase"]
    assert by_phase["generate"]["max"] - by_phase["train"]["min"] > 64 << 20


def test_a_sweep_that_generates_less_than_it_trains(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "rlpatch", "bench", "--shape", "tiny", "--variants", "rlpatch", "--completions", "2",
        "--prompt-tokens", "8", "--kv-gib", "0.125", "--eager", "--models", str(tmp_path / "models"), "--out",
        str(tmp_path), "--name", "sweep", "--sweep-context", "--sweep-step", "32", "--sweep-max", "64",
        "--rollout-tokens", "6",
    ]  # fmt: skip
    answer = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert answer.returncode == 0, answer.stdout + answer.stderr
    found = json.loads((tmp_path / "sweep.json").read_text())["sweep"]
    first, second = found["variants"]["rlpatch"]["attempts"]
    assert found["rollout"] == 6 and found["variants"]["rlpatch"]["best"] == 64
    assert first["detail"]["generated"] == second["detail"]["generated"] == 2 * 6
    assert (first["detail"]["trained"], second["detail"]["trained"]) == (32.0, 64.0)
    assert found["variants"]["rlpatch"]["kv"]["bytes"] == 128 << 20
    again = subprocess.run(
        [*command, "--resume"], capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert again.returncode == 0, again.stdout + again.stderr
    resumed = json.loads((tmp_path / "sweep.json").read_text())
    assert resumed["sweep"] == found and len(resumed["resumed"]) == 1
