"""One file per process: vLLM's memory pool (``CuMemAllocator``) serves one engine, and every file here builds one."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    files = sorted({item.path for item in items if item.path.parent.name == "gpu"})
    if len(files) > 1:
        raise pytest.UsageError(
            "tests/gpu needs a process per file, for vLLM's memory pool serves one engine per process: "
            "for file in tests/gpu/test_*.py; do pytest $file || break; done"
        )
