"""The collector's view of the heap while an engine is built, in an interpreter as it starts (3.12: 375 are frozen)."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import gc
from rlpatch.adapters.vllm import _collector

heap = [[number] for number in range(100_000)]
walked = []

def engine():
    engine.objects = [[number] for number in range(5_000)]
    walked.append(len(gc.get_objects()))
    if freezes:
        gc.freeze()

for freezes in (False, True):
    walked.clear()
    instance = object()
    _collector._build(engine, instance, (), {})
    assert 5_000 <= walked[0] < 50_000, walked
    assert gc.get_freeze_count() == 0, gc.get_freeze_count()
    assert (id(instance) in _collector._kept) is freezes
print("done")
"""


def test_the_heap_is_out_of_sight_while_an_engine_is_built_and_thaws() -> None:
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120)
    assert run.stdout == "done\n", run.stderr[-2000:]
