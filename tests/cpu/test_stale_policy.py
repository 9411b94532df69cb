"""A policy that no longer reaches the engine is told, once; one that does is not. Real rollouts and log-probs."""

from __future__ import annotations

import inspect
import logging
from dataclasses import fields
from typing import Any

import pytest
import trl

import rlpatch
from rlpatch.demo import worker
from rlpatch.patching import Patch, PatchSet

pytestmark = pytest.mark.cpu

CONFIG = {field.name for field in fields(trl.GRPOConfig)}


@pytest.fixture(params=["TRL's metric", "TRL's tensors"])
def config(request: Any) -> dict[str, Any]:
    if "vllm_importance_sampling_correction" not in CONFIG:
        pytest.skip("this TRL does not ask vLLM for log-probs")
    if request.param == "TRL's metric":
        return {}
    if 'output["sampling_per_token_logps"]' not in inspect.getsource(trl.GRPOTrainer._generate_and_score_completions):
        pytest.skip("without the correction, this TRL keeps no rollout log-probs")
    return {"vllm_importance_sampling_correction": False}


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if "have parted" in record.message]


def test_a_healthy_run_is_silent(trainer_of: Any, config: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="rlpatch"):
        trainer_of(steps=6, config=config).train()
    agreement = rlpatch.status().pairs[-1]["agreement"]
    assert agreement["seen"] == 6 and 0 < agreement["level"] <= agreement["last"] * 10 and agreement["last"] < 1e-5
    assert not agreement["parted"] and warned(caplog) == []


def test_a_push_that_does_not_arrive_is_told_once(
    trainer_of: Any, config: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trainer_of(apply={"share_weights": False}, steps=8, config=config)
    lost = PatchSet("lost push", [Patch(*worker.phase_functions(trainer)[0], lambda *_: None)])
    lost.apply()
    try:
        with caplog.at_level(logging.WARNING, logger="rlpatch"):
            trainer.train()
    finally:
        lost.revert()
    agreement = rlpatch.status().pairs[-1]["agreement"]
    assert agreement["parted"] and agreement["last"] > 1e-3 > agreement["level"]
    (message,) = warned(caplog)
    assert "share_weights is off" in message and "push is skipped or does not reach the engine" in message
