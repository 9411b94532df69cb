"""A real trainer/engine pair in this process, built once per test module."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ports import free_port

sys.path.insert(0, str(Path(__file__).parent))  # suite.py
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("RLPATCH_DEFAULTS", "0")  # plain and patched runs are compared; test_config_fixups.py has its own
os.environ.setdefault("MASTER_PORT", str(free_port()))  # TRL's default would clash with the golden suite's processes

for library in ("torch", "vllm"):
    pytest.importorskip(library)
import old_trl  # noqa: E402

old_trl.make_importable()
pytest.importorskip("trl")

if importlib.util.find_spec("trl.generation") is None:
    # Trainers before 0.28 hold their engine themselves: what drives `VLLMGeneration` directly has nothing to drive.
    collect_ignore = [f.name for f in Path(__file__).parent.glob("test_*.py") if ".vllm_generation." in f.read_text()]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    from rlpatch.demo import tiny

    return str(tiny.write_model(tmp_path_factory.mktemp("model"), "qwen3"))


@pytest.fixture
def trainer_of(tiny_model: str) -> Iterator[Any]:
    """``trainer_of(**job)`` builds a patched trainer (rlpatch applied as the job says); reverted afterwards."""
    import rlpatch
    from rlpatch.demo import worker

    made: list[Any] = []

    def make(apply: dict[str, Any] | None = None, **changes: Any) -> Any:
        rlpatch.apply(**(apply or {}))
        made.append(worker.make_trainer(worker.Job(changes.pop("model", tiny_model), True, **changes)))
        return made[-1]

    yield make
    rlpatch.revert()
    for trainer in made:
        with contextlib.suppress(AttributeError):  # a test has taken the engine away
            _end_of_the_kv_cache(worker.engine_of(trainer))


def _end_of_the_kv_cache(llm: Any) -> None:
    """vLLM freezes the heap when an engine starts, so engines are never collected; with the KV caches that reverting brings
    back they would add up to gigabytes, and vLLM then refuses to start yet another engine."""
    from rlpatch.engine import Engine

    for tensor in Engine(llm).kv_tensors():
        tensor.untyped_storage().resize_(0)


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process: an engine of plain TRL leaves variables for which accelerate wraps the next trainer's model."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def collected() -> None:
    """Earlier engines are gone: one that is collected while a trainer is built takes the process group along."""
    import gc

    gc.unfreeze()  # vLLM freezes what is alive when an engine starts
    gc.collect()


@pytest.fixture
def sleepy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that sleeps: the platform says that it can, and level 2 leaves zeros, as a GPU's fresh memory may."""
    from dataclasses import fields

    import torch
    import trl
    from vllm.platforms import current_platform
    from vllm.v1.worker.cpu_worker import CPUWorker

    if "vllm_enable_sleep_mode" not in {field.name for field in fields(trl.GRPOConfig)}:
        pytest.skip("this TRL has no sleep mode")

    def sleep(self: Any, level: int = 1) -> None:
        if level == 2:
            with torch.no_grad():
                for parameter in self.model_runner.get_model().parameters():
                    parameter.zero_()

    monkeypatch.setattr(type(current_platform), "is_sleep_mode_available", classmethod(lambda cls: True))
    monkeypatch.setattr(CPUWorker, "sleep", sleep)
