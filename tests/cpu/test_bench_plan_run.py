"""The plan's bench on real vLLM and TRL: what a CPU can count is the plan's to the byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.cpu, pytest.mark.timeout(600)]


def test_the_plan_against_the_tiny_shape(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "rlpatch.bench.plan", "--settings", "script-lora,reference", "--steps", "2",
        "--completions", "4", "--models", str(tmp_path / "models"), "--out", str(tmp_path / "plan.json"),
    ]  # fmt: skip
    answer = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert answer.returncode == 0, answer.stdout + answer.stderr
    document = json.loads((tmp_path / "plan.json").read_text())
    assert document["schema"] == 1 and document["device"]["name"] == "CPU" and document["versions"]["vllm"]
    exact = {
        "script-lora": {"weights", "LoRA", "optimizer state", "gradients", "KV cache"},
        "reference": {"weights", "reference model", "optimizer state", "gradients", "KV cache"},
    }
    for name, terms in exact.items():
        result = document["settings"][f"tiny {name}"]["result"]
        assert result["plan"]["applied"] and not result["problems"]
        assert {"share_weights", "memory_plan", "lora_casts"} <= set(result["in_force"])
        rows = {row["name"]: row for row in result["rows"]}
        assert terms <= set(rows)
        for term in terms:
            slack = 4096 if term == "optimizer state" else 0  # a float32 count of steps per tensor
            assert 0 <= rows[term]["measured"] - rows[term]["planned"] <= slack, (name, rows[term])
        assert rows["training: backward pass"]["why"] == "a CPU has no such memory"
        assert rows["total training"]["measured"] is None
    assert "a CPU has no such memory" in answer.stdout and "tiny reference: full fine-tuning" in answer.stdout
