"""Python's garbage collector kept off a heap that need not be walked.

A full collection walks every container of the process. ``gc.freeze()`` moves all that exists out of its sight without
looking at it, ``gc.unfreeze()`` brings it back, all of it: the collector cannot thaw a part. So what somebody else has
frozen stays so, and nothing is added to it.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

# More than an interpreter itself freezes when it starts (Python 3.12: 375). Nobody needs those frozen.
INTERPRETERS = 1000
_ours = False


def frozen() -> int:
    """Objects that a script or a library has frozen; those of `out_of_sight` do not count."""
    count = gc.get_freeze_count()
    return 0 if _ours or count <= INTERPRETERS else count


def back_in_sight() -> None:
    """End `out_of_sight`, wherever it began."""
    global _ours
    if _ours:
        _ours = False
        gc.unfreeze()


@contextlib.contextmanager
def out_of_sight() -> Iterator[None]:
    """Collect once; what exists then is not walked until the end of the block. Nothing, where something is frozen."""
    global _ours
    if _ours or frozen():
        yield
        return
    gc.collect()  # what is garbage now may hold the device's memory, and would stay until the end
    gc.freeze()
    _ours = True
    try:
        yield
    finally:
        back_in_sight()
