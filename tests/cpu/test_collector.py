"""Python's garbage collector around real engines: the trainer's garbage stays collectable, captures run without it."""

from __future__ import annotations

import gc
import importlib
import logging
import os
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

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


def test_what_the_interpreter_itself_froze_does_not_count(tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlpatch import collector

    python_3_12_freezes = 375
    assert python_3_12_freezes < collector.INTERPRETERS
    monkeypatch.setattr(collector, "INTERPRETERS", 10**9)  # as if all of these were the interpreter's
    gc.freeze()
    with rlpatch.patched(**ONLY):
        assert build(tiny_model) == (True, 0)


def test_building_an_engine_does_not_walk_the_trainers_objects(tiny_model: str) -> None:
    heap = [[number] for number in range(300_000)]
    walked: list[int] = []

    def event(phase: str, info: dict[str, Any]) -> None:
        if phase == "start" and info["generation"] == 2:
            walked.append(len(gc.get_objects(2)))

    def full_collections() -> list[int]:
        from vllm.v1.engine.core import EngineCore

        init = EngineCore.__init__

        def watched(self: Any, *args: Any, **kwargs: Any) -> None:
            gc.callbacks.append(event)
            try:
                init(self, *args, **kwargs)
            finally:
                gc.callbacks.remove(event)

        walked.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(EngineCore, "__init__", watched)
            build(tiny_model)
        return list(walked)

    with rlpatch.patched(exclude=["graph_capture_gc"]):
        assert max(full_collections()) > len(heap)
    gc.unfreeze()
    with rlpatch.patched(**ONLY):
        seen = full_collections()
        assert seen and max(seen) < len(heap)


def test_a_build_that_fails_leaves_nothing_frozen(tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.engine.core import EngineCore

    frozen = []

    def failing(self: Any, *args: Any, **kwargs: Any) -> None:
        frozen.append(gc.get_freeze_count())
        raise RuntimeError("no room")

    monkeypatch.setattr(EngineCore, "__init__", failing)
    for switch in ("0", "1"):  # 1: vLLM's own way to leave the collector alone
        monkeypatch.setenv("VLLM_ENABLE_CUDAGRAPH_GC", switch)
        with rlpatch.patched(**ONLY), pytest.raises(RuntimeError, match="no room"):
            build(tiny_model)
        assert gc.get_freeze_count() == 0 and gc.isenabled()
    assert frozen[0] > 0 and frozen[1] == 0


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


# ---- training --------------------------------------------------------------------------------------------------------


class Walks(TrainerCallback):  # type: ignore[misc]
    """How many objects a full collection would walk at the end of each step, and how many it would not."""

    def __init__(self, act: Callable[[], None] = lambda: None) -> None:
        self.act = act
        self.walked: list[int] = []
        self.frozen: list[int] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.act()
        self.walked.append(len(gc.get_objects()))
        self.frozen.append(gc.get_freeze_count())


def test_training_does_not_walk_what_was_there_before_it(trainer_of: Any) -> None:
    heap = [[number] for number in range(100_000)]
    for excluded in ([], ["training_gc"]):
        trainer = trainer_of(apply={"exclude": excluded, "defaults": False}, steps=2)
        walks = Walks()
        trainer.add_callback(walks)
        trainer.train()
        assert len(walks.walked) == 2
        if excluded:
            assert min(walks.walked) > len(heap) and walks.frozen == [0, 0]
        else:
            assert max(walks.walked) < len(heap) < min(walks.frozen)
        assert gc.get_freeze_count() == 0
        rlpatch.revert()


def test_what_became_garbage_during_training_is_collected_after_it(trainer_of: Any) -> None:
    trainer = trainer_of(steps=1)
    nodes = [Node()]
    before, within = weakref.ref(nodes[0]), []

    def drop() -> None:
        nodes.clear()
        node = Node()
        within.append(weakref.ref(node))
        del node
        gc.collect()
        within.append(before)

    trainer.add_callback(Walks(drop))
    alive: list[bool] = []
    trainer.add_callback(Walks(lambda: alive.extend(ref() is not None for ref in within)))
    trainer.train()
    assert alive == [False, True]  # made within; made before
    gc.collect()
    assert before() is None


def test_a_training_that_fails_leaves_nothing_frozen(trainer_of: Any) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    trainer = trainer_of(steps=1)
    trainer.add_callback(Walks(stop))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert gc.get_freeze_count() == 0 and gc.isenabled()


def test_what_a_script_has_frozen_stays_so(trainer_of: Any) -> None:
    trainer = trainer_of(steps=1)
    walks = Walks()
    trainer.add_callback(walks)
    gc.freeze()
    before = gc.get_freeze_count()
    trainer.train()
    assert 0.9 * before < gc.get_freeze_count() <= before and walks.frozen[0] <= before


def test_an_engine_that_is_built_while_training_is_kept_as_any_other(trainer_of: Any) -> None:
    """A callback that makes a second trainer: its engine thaws all, and is not collected under it."""
    from rlpatch.adapters.vllm import _collector

    instance = object()
    trainer = trainer_of(steps=1)
    walks = Walks(lambda: _collector._build(gc.freeze, instance, (), {}))
    trainer.add_callback(walks)
    trainer.train()
    assert walks.frozen == [0] and _collector._kept.pop(id(instance)) is instance and gc.get_freeze_count() == 0


def test_a_trainer_without_an_engine_is_left_alone(tmp_path: Path) -> None:
    import torch
    from transformers import Trainer, TrainingArguments

    class Model(torch.nn.Linear):
        def forward(self, x: Any, labels: Any = None) -> Any:
            return {"loss": super().forward(x).sum()}

    walks = Walks()
    arguments = TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True, save_strategy="no")
    with rlpatch.patched():
        data = [{"x": torch.ones(2), "labels": torch.ones(1)}] * 8
        Trainer(Model(2, 1), arguments, train_dataset=data, callbacks=[walks]).train()
    assert walks.frozen == [0]


# ---- capture: the real runner classes, with a stand-in for what they capture (no CUDA graphs on a CPU) ------------------


@pytest.fixture(params=RUNNERS)
def runner(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """(runner class, list of (collector is on, something is frozen) in each capture)."""
    try:
        cls = importlib.import_module(request.param).GPUModelRunner
    except ImportError as error:
        pytest.skip(f"{request.param} cannot be imported on this machine: {error}")
    seen: list[tuple[bool, bool]] = []

    def capture_model(self: Any, fails: bool = False, thaws: bool = False) -> int:
        seen.append((gc.isenabled(), gc.get_freeze_count() > 0))
        if thaws:  # as vLLM 0.20 and later do at the end of their own rest
            gc.unfreeze()
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
        assert wrapped(cls)
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
        monkeypatch.delenv("VLLM_ENABLE_CUDAGRAPH_GC")

        # while an engine is built: vLLM's own rest inside of ours thaws all
        from rlpatch.adapters.vllm import _collector

        frozen = []

        def build_engine() -> None:
            instance.capture_model(thaws=True)
            frozen.append(gc.get_freeze_count())

        _collector._build(build_engine, object(), (), {})
        assert frozen[0] > 0 and gc.get_freeze_count() == 0
    assert vars(cls)["capture_model"] is original
