"""Where fetched sources are kept: outside of any repository, each file complete or not there at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

_PART = ".part-"
_STALE = 24 * 3600.0  # seconds after which a part file's writer is taken for dead


def folder() -> Path:
    """``$RLPATCH_CACHE/sources``, else ``$XDG_CACHE_HOME/rlpatch/sources``, else ``~/.cache/rlpatch/sources``."""
    own = os.environ.get("RLPATCH_CACHE")
    if own:
        return Path(own).expanduser() / "sources"
    user = os.environ.get("XDG_CACHE_HOME")
    return (Path(user) if user else Path.home() / ".cache") / "rlpatch" / "sources"


@contextlib.contextmanager
def part(target: Path) -> Iterator[Path]:
    """A new empty file beside `target`, which takes its place at the end; on any exception neither changes.

    Two processes may write the same target: each has a file of its own, and the last one stays.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target.parent)
    handle, name = tempfile.mkstemp(prefix=_PART, dir=target.parent)
    os.close(handle)
    try:
        yield Path(name)
        os.replace(name, target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def write(target: Path, content: bytes) -> None:
    """Write a small file whole or not at all."""
    with part(target) as path:
        path.write_bytes(content)


def _sweep(place: Path) -> None:
    """Remove what processes that were killed have left behind."""
    for left in place.glob(f"{_PART}*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _STALE:
                left.unlink()
