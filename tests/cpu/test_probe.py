"""The probe on real releases: it succeeds where sharing and standby work, and fails where either is broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import rlpatch
from rlpatch import probe

pytestmark = pytest.mark.cpu

# Each sabotage breaks one promise; the last run is whole again, in the same process.
SABOTAGED = """
import contextlib, json, os, sys

out = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

from unittest.mock import patch

import rlpatch.standby
from rlpatch import phases, probe
from rlpatch.sharing import account, share

alias, fill = share.Sharing._alias, share.Sharing.fill

def aliased_nowhere(self, entry):
    self.shared.append(entry)

def one_stale_tensor(self, engine_model, loader):
    fill(self, engine_model, loader)
    entry = next(entry for entry in self.shared if "o_proj" in entry.slot.name)
    entry.slot.tensor.data = entry.slot.tensor.data * 2
    entry.pointer = entry.slot.tensor.data_ptr()

unverified = patch.object(share.Sharing, "verify", lambda self: None)
uncounted = patch.object(account, "resident_twice", lambda trainer, engine: 0)
cases = {
    "cloned": [patch.object(share, "own_storage", lambda view: view.detach().clone())],
    "not aliased": [patch.object(share.Sharing, "_alias", aliased_nowhere), unverified],
    "not aliased, not counted": [patch.object(share.Sharing, "_alias", aliased_nowhere), unverified, uncounted],
    "another policy": [patch.object(share.Sharing, "fill", one_stale_tensor), unverified, uncounted],
    "never released": [
        patch.object(rlpatch.standby.KVStandby, "release", lambda self, **_: setattr(self, "released", True)),
        patch.object(rlpatch.standby.KVStandby, "restore", lambda self, **_: setattr(self, "released", False)),
    ],
    "whole": [],
}
for name, patches in cases.items():
    checks = []
    with contextlib.ExitStack() as stack:
        for entry in patches:
            stack.enter_context(entry)
        result = probe.check(lambda message: checks.append(message["check"]) if "check" in message else None)
    print(json.dumps({"case": name, "checks": checks, **result}), file=out, flush=True)
os._exit(0)
"""


@pytest.fixture(scope="module")
def sabotaged() -> dict[str, dict]:
    env = {**probe.environment(), "PYTHONPATH": str(Path(rlpatch.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", SABOTAGED], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return {result["case"]: result for result in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize(("case", "step", "word"), [
    ("cloned", "sharing", "share nothing"),
    ("not aliased", "sharing", "resident twice"),
    ("not aliased, not counted", "write", "did not reach the engine"),
    ("another policy", "agreement", "differ by"),
    ("never released", "standby", "KV bytes resident"),
])  # fmt: skip
def test_the_probe_fails_when_a_promise_is_broken(sabotaged: dict[str, dict], case: str, step: str, word: str) -> None:
    result = sabotaged[case]
    assert word in result["error"] and result["remedy"]
    assert [check["name"] for check in result["checks"] if not check["ok"]] == [step]
    assert result["checks"][-1]["name"] == step


def test_the_same_process_succeeds_when_nothing_is_broken(sabotaged: dict[str, dict]) -> None:
    result = sabotaged["whole"]
    assert result["error"] is None
    assert [check["name"] for check in result["checks"]] == list(probe.STEPS)


def test_doctor_probes_with_success() -> None:
    """The command as a person runs it, with a launcher's and rlpatch's variables in the way."""
    env = {
        **os.environ, "WORLD_SIZE": "2", "RANK": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "RLPATCH_STANDBY": "0",
        "PYTHONPATH": str(Path(rlpatch.__file__).parent.parent),
    }  # fmt: skip
    command = [sys.executable, "-m", "rlpatch", "doctor", "--probe", "--json"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    data = json.loads(done.stdout)
    result = data["probe"]
    assert result["ok"], (result["error"], result["tail"])
    assert done.returncode == (0 if data["ok"] else 1)
    assert data["ok"], data["findings"]
    assert all(check["ok"] for check in result["checks"])
    assert result["sharing"]["shared"] and not result["sharing"]["copied"]
    states = {outcome["capability"]: outcome["state"] for outcome in data["capabilities"]}
    assert states["share_weights"] == states["engine"] == states["generation"] == "applied"
    assert states["standby"] == "skipped"  # the environment has it switched off; the probe tries it all the same


def test_a_missing_module_is_explained(tmp_path: Path) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("raise ImportError('libtorch.so: undefined symbol: _ZN3c10')\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from rlpatch import probe; sys.exit(probe.main([]))"
    result = probe.run(300, [sys.executable, "-c", code])
    assert not result.ok and "undefined symbol" in (result.error or "") and "reinstall" in (result.remedy or "")
    assert [check.name for check in result.checks if not check.ok] == ["import"]
