"""The demo for real: two fresh processes, one JSON document, and a non-zero exit when the runs differ."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.cpu


def test_demo_json() -> None:
    command = [sys.executable, "-m", "rlpatch", "demo", "--json", "--steps", "2"]
    # as a shell has it: an engine built in this process left variables for which accelerate wraps the demo's model
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    answer = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert answer.returncode == 0, answer.stderr[-3000:]
    document = json.loads(answer.stdout)  # nothing else on standard output
    assert document["differences"] == []
    assert document["plain"]["weights_twice_bytes"] > 0 == document["patched"]["weights_twice_bytes"]
    assert document["plain"]["kv_training_bytes"] > 0 == document["patched"]["kv_training_bytes"]
    assert len(document["patched"]["steps"]) == 2
