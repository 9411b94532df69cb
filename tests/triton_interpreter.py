"""Code for Triton's interpreter, which must be chosen before Triton is imported: in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path


def agrees(code: str, folder: Path) -> None:
    """Run `code`, written to `folder`; it prints "agreed" and nothing else, or the test fails with what it wrote."""
    script = folder / "case.py"
    script.write_text(textwrap.dedent(code))
    path = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
    answer = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert answer.stdout == "agreed\n", answer.stderr[-3000:]
