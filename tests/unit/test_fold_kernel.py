"""The fold's Triton passes, under Triton's interpreter: it must be chosen before Triton is imported, in a fresh process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

CASES = Path(__file__).with_name("fold_kernel_cases.py")


@pytest.mark.timeout(2400)  # the interpreter takes five minutes on a core of its own
def test_cases_in_the_interpreter() -> None:
    # -p no:cacheprovider, --rootdir: nothing of this run may touch the one around it
    command = [sys.executable, "-m", "pytest", str(CASES), "-q", "-x", "-p", "no:cacheprovider"]
    answer = subprocess.run(
        command,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=CASES.parents[2],
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stdout[-6000:] + answer.stderr[-2000:]
    assert " passed" in answer.stdout and "skipped" not in answer.stdout
