"""What an installed rlpatch consists of (run by tox against the built wheel)."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def installed_files() -> list[str]:
    try:
        files = [str(path) for path in metadata.files("rlpatch") or ()]
    except metadata.PackageNotFoundError:
        pytest.skip("rlpatch is not installed here")
    if "rlpatch/__init__.py" not in files:
        pytest.skip("rlpatch is installed in editable mode")
    return [path for path in files if "__pycache__" not in path]


def test_nothing_but_rlpatch_is_installed() -> None:
    tops = {path.split("/")[0] for path in installed_files()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"rlpatch"}


def test_every_adapter_is_packaged_once_as_rlpatch_adapters() -> None:
    packaged = sorted(path for path in installed_files() if "adapters/" in path and path.endswith(".py"))
    own = sorted(
        f"rlpatch/adapters/{path.relative_to(ROOT / 'adapters')}" for path in (ROOT / "adapters").rglob("*.py")
    )
    assert packaged == own


def test_data_files_are_packaged() -> None:
    assert {"rlpatch/compat_matrix.yaml", "rlpatch/py.typed"} <= set(installed_files())
