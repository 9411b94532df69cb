"""A real trainer/engine pair in this process, built once per test module."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # suite.py
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("RLPATCH_DEFAULTS", "0")  # plain and patched runs are compared; test_config_fixups.py has its own
os.environ.setdefault("MASTER_PORT", "29613")  # TRL's default would clash with the golden suite's processes

for library in ("torch", "vllm"):
    pytest.importorskip(library)
import old_trl  # noqa: E402

old_trl.make_importable()
pytest.importorskip("trl")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    from rlpatch.demo import tiny

    return str(tiny.write_model(tmp_path_factory.mktemp("model"), "qwen3"))


@pytest.fixture
def trainer_of(tiny_model: str) -> Iterator[Any]:
    """``trainer_of(**job)`` builds a patched trainer (rlpatch applied as the job says); reverted afterwards."""
    import rlpatch
    from rlpatch.demo import worker

    def make(apply: dict[str, Any] | None = None, **changes: Any) -> Any:
        rlpatch.apply(**(apply or {}))
        return worker.make_trainer(worker.Job(changes.pop("model", tiny_model), True, **changes))

    yield make
    rlpatch.revert()
