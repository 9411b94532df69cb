"""Python's garbage collector around real engines: the trainer's garbage stays collectable, captures run without it."""

from __future__ import annotations

import gc
import importlib
import logging
import os
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

pytest.importorskip("vllm")

import rlpatch
from rlpatch.demo.worker import engine_of

pytestmark = [pytest.mark.cpu, pytest.mark.timeout(600)]

ONLY = {"include": ["graph_capture_gc"]}
RUNNERS = ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner")


@pytest.fixture(autouse=True)
def thawed() -> Iterator[None]:
    """Nothing is frozen before and after, and the collector is on."""
    gc.unfreeze()
    yield
    gc.unfreeze()
    gc.enable()
    rlpatch.revert()


class Node:
    """Part of a reference cycle, like a module and its parameters' hooks."""

    def __init__(self) -> None:
        self.me = self


def build(tiny_model: str) -> tuple[bool, int]:
    """Build an engine in this process beside a live cycle; (the cycle can be collected afterwards, objects frozen)."""
    from vllm import LLM

    node = Node()
    seen = weakref.ref(node)
    llm = LLM(tiny_model, dtype="float32", enforce_eager=True, kv_cache_memory_bytes=16 << 20, max_model_len=64)
    frozen = gc.get_freeze_count()
    del node
    gc.collect()
    collected = seen() is None
    llm.llm_engine.engine_core.shutdown()
    return collected, frozen


def test_the_trainers_garbage_can_be_collected_after_the_engine_was_built(tiny_model: str) -> None:
    with rlpatch.patched(exclude=["graph_capture_gc"]) as report:  # what it is without
        assert str(report["graph_capture_gc"].state) == "skipped"
        collected, frozen = build(tiny_model)
    assert not collected and frozen > 0, "this vLLM does not freeze the heap: the capability is not needed"
    gc.unfreeze()
    with rlpatch.patched(**ONLY) as report:
        assert str(report["graph_capture_gc"].state) in ("applied", "waiting")
        assert build(tiny_model) == (True, 0)
        assert str(rlpatch.status()["graph_capture_gc"].state) == "applied"


def test_what_was_frozen_before_stays_frozen_and_that_is_said(
    tiny_model: str, caplog: pytest.LogCaptureFixture
) -> None:
    gc.freeze()
    before = gc.get_freeze_count() // 2  # some of it dies until the engine is built
    caplog.set_level(logging.INFO, "rlpatch")
    with rlpatch.patched(**ONLY):
        _, frozen = build(tiny_model)
    assert frozen >= before and "and the collector cannot thaw a part" in caplog.text


# ---- rollouts --------------------------------------------------------------------------------------------------------


def test_the_collector_rests_while_a_trainer_s_engine_generates(
    trainer_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(steps=1)
    engine, generate = engine_of(trainer).llm_engine, trainer.vllm_generation.generate
    step, seen = engine.step, []
    monkeypatch.setattr(engine, "step", lambda: (seen.append(gc.isenabled()), step())[1])
    prompts = [[5, 6, 7]]
    generate(prompts=prompts, images=None, num_generations=1)
    assert seen and not any(seen) and gc.isenabled()
    monkeypatch.setattr(engine, "step", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(prompts=prompts, images=None, num_generations=1)
    assert gc.isenabled()


def test_whoever_switched_it_off_keeps_it_off() -> None:
    from rlpatch.adapters.vllm.rollout_gc_v0_9 import paused

    gc.disable()
    with paused():
        pass
    assert not gc.isenabled()
    gc.enable()


def test_it_need_not_rest(trainer_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(apply={"exclude": ["rollout_gc"]}, steps=1)
    engine, seen = engine_of(trainer).llm_engine, []
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: (seen.append(gc.isenabled()), step())[1])
    trainer.vllm_generation.generate(prompts=[[5, 6, 7]], images=None, num_generations=1)
    assert seen and all(seen)


# ---- capture: the real runner classes, with a stand-in for what they capture (no CUDA graphs on a CPU) ------------------


@pytest.fixture(params=RUNNERS)
def runner(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """(runner class, list of (collector is on, something is frozen) in each capture)."""
    try:
        cls = importlib.import_module(request.param).GPUModelRunner
    except ImportError as error:
        pytest.skip(f"{request.param} cannot be imported on this machine: {error}")
    seen: list[tuple[bool, bool]] = []

    def capture_model(self: Any, fails: bool = False) -> int:
        seen.append((gc.isenabled(), gc.get_freeze_count() > 0))
        if fails:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        return 7

    monkeypatch.setattr(cls, "capture_model", capture_model)
    return cls, seen


def wrapped(cls: Any) -> bool:
    return type(vars(cls)["capture_model"]).__name__ == "FunctionWrapper"


def test_the_collector_rests_during_a_capture_and_is_as_before_after_it(
    runner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cls, seen = runner
    original = vars(cls)["capture_model"]
    instance = object.__new__(cls)
    with rlpatch.patched(**ONLY):
        importlib.import_module("vllm.entrypoints.llm")
        if not wrapped(cls):
            assert rlpatch.status()["graph_capture_gc"].adapter == "vllm/collector_v0_30"
            pytest.skip("this vLLM rests the collector itself")
        assert instance.capture_model() == 7
        with pytest.raises(RuntimeError, match="capturing"):
            instance.capture_model(fails=True)
        assert seen == [(False, True)] * 2 and gc.isenabled() and gc.get_freeze_count() == 0
        gc.disable()
        instance.capture_model()
        assert not gc.isenabled()
        gc.enable()
        gc.freeze()
        before = gc.get_freeze_count()
        instance.capture_model()
        # nothing thawed, nothing added; what nobody refers to any more leaves by itself
        assert 0.9 * before < gc.get_freeze_count() <= before and gc.isenabled()
        gc.unfreeze()
        monkeypatch.setenv("VLLM_ENABLE_CUDAGRAPH_GC", "1")
        instance.capture_model()
        assert seen[-1] == (True, False)
    assert vars(cls)["capture_model"] is original
