"""TRL's own sleep mode, where it stays in charge because the weights are not shared: which weights do rollouts come from?

vLLM refuses sleep mode on a CPU, and ``CPUWorker.sleep`` does nothing; for the two stand-ins see ``sleepy`` in conftest.py.
Everything else is real: TRL's calls, the push, ``reload_weights``.
Whether plain TRL goes wrong is held against compat_matrix.yaml, release by release.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import trl

import rlpatch
from rlpatch import matrix, phases, versions
from rlpatch.demo import worker
from rlpatch.engine import Engine
from rlpatch.patching import Patch, PatchSet

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("collected")]

# Every evaluation is a second generation in its step
EVALUATE = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 8}
UNSHARED = {"share_weights": False, "standby": False}


def known_bad(*ids: str) -> bool:
    """Whether the matrix says that one of these concerns the installed releases."""
    installed = {library: versions.installed(library) for library in versions.DISTRIBUTIONS}
    return any(entry.id in ids for entry in matrix.load().known_bad_for(installed))


class Stale(Exception):
    """An engine is about to generate with weights that are not the policy's."""


@contextlib.contextmanager
def lags(trainer: Any, limit: float = float("inf")) -> Iterator[list[float]]:
    """Per generation: the largest difference between the engine's head and the trainer's; `Stale` above `limit`."""
    engine, seen = Engine(worker.engine_of(trainer)), []

    def generate(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ours, theirs = trainer.model.get_parameter("lm_head.weight"), engine.model.get_parameter("lm_head.weight")
        seen.append(float((ours - theirs[: ours.shape[0]]).detach().abs().max()))
        if seen[-1] > limit:
            raise Stale
        return wrapped(*args, **kwargs)

    patch_set = PatchSet("lags", [Patch("vllm.entrypoints.llm", "LLM.generate", generate)])
    patch_set.apply()
    try:
        yield seen
    finally:
        patch_set.revert()


def trained(trainer: Any, limit: float = float("inf")) -> list[float]:
    with lags(trainer, limit) as seen, contextlib.suppress(Stale):
        trainer.train()
    return seen


def make(tiny_model: str, kind: str, patched: bool, **config: Any) -> Any:
    if kind == "rloo":
        turn = getattr(trl.RLOOTrainer, "_generate_single_turn", None)
        before, prepares, _ = (inspect.getsource(turn) if turn else "").partition("[prepare_multimodal_messages_vllm")
        if prepares and "is_conversational" not in before:
            pytest.skip("this TRL's RLOO takes no plain text prompts")
    job = worker.Job(
        tiny_model, patched, steps=3, trainer=kind, config={"vllm_enable_sleep_mode": True, **EVALUATE, **config}
    )
    return worker.make_trainer(job)


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_plain_sleep_mode_is_as_the_matrix_says(tiny_model: str, sleepy: None, kind: str) -> None:
    rlpatch.apply(include=["cpu_weights"])
    try:
        seen = trained(make(tiny_model, kind, False))
    finally:
        rlpatch.revert()
    assert len(seen) >= 6
    assert (max(seen) > 1e-4) == known_bad("trl-sleep-serves-base", "trl-025-skipped-sync"), seen


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_sleep_mode_serves_the_policy(tiny_model: str, sleepy: None, kind: str) -> None:
    """Broken on purpose: without ``on_discarded`` this fails wherever the matrix has plain TRL go wrong."""
    rlpatch.apply(**UNSHARED)
    try:
        trainer = make(tiny_model, kind, True)
        seen = trained(trainer)
        pair = rlpatch.status().pairs[-1]
    finally:
        rlpatch.revert()
    assert pair["not shared"] == "share_weights is off"
    assert len(seen) >= 6 and max(seen) == 0


def test_an_untagged_wake_brings_back_the_kv_cache_alone(trainer_of: Any) -> None:
    """TRL 0.23 and 0.24 name no tags; before 0.28 vLLM then maps the weights, which never slept, once more."""
    trainer = trainer_of(apply={"share_weights": False})
    llm = worker.engine_of(trainer)
    pair = phases.of_engine(llm)
    assert pair is not None and pair.standby is not None and pair.standby.released
    llm.wake_up()
    assert not pair.standby.released and pair.standby.mechanism.resident_bytes() > 0
    trainer.train()
    assert pair.standby.released
