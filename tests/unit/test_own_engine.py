"""Trainers that build an engine themselves: what can be told without TRL. The modules here are stand-ins for TRL's."""

from __future__ import annotations

import logging
import sys
import types
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from rlpatch.adapters.trl import _own_engine, online_dpo_v0_18
from rlpatch.patching import PatchSet
from rlpatch.registry import Context

MODULE = "trl.trainer.online_dpo_trainer"


class Engine:
    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments


class OnlineDPOTrainer:
    """As before 0.23: the engine is built before there is a model of the trainer's."""

    def __init__(self, path: str) -> None:
        self.llm = sys.modules[MODULE].LLM(model=path)  # type: ignore[attr-defined]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    fake = types.ModuleType(MODULE)
    fake.LLM, fake.OnlineDPOTrainer = Engine, OnlineDPOTrainer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, MODULE, fake)
    yield fake


def test_a_trainer_that_cannot_be_served_says_so_and_runs(
    module: types.ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    assert online_dpo_v0_18.ADAPTER.probe is not None and online_dpo_v0_18.ADAPTER.probe() is None
    assert online_dpo_v0_18.ADAPTER.patches is not None
    patches = PatchSet("notice", online_dpo_v0_18.ADAPTER.patches(Context()))
    patches.apply()
    with caplog.at_level(logging.WARNING, logger="rlpatch"):
        trainer = OnlineDPOTrainer("somewhere")
    assert type(trainer.llm) is Engine and trainer.llm.arguments == {"model": "somewhere"}
    (record,) = caplog.records
    assert (
        record.message.startswith("rlpatch: OnlineDPOTrainer runs as without rlpatch: ") and "\n" not in record.message
    )
    assert patches.revert() == [] and module.LLM is Engine


def test_an_engine_built_without_a_trainer_is_left_alone(module: types.ModuleType) -> None:
    class Trainer(OnlineDPOTrainer):
        def _move_model_to_vllm(self) -> None: ...

    module.Trainer = Trainer  # type: ignore[attr-defined]
    assert _own_engine.missing(MODULE, "Trainer") is None
    assert _own_engine.missing(MODULE, "OnlineDPOTrainer") == "OnlineDPOTrainer has no _move_model_to_vllm"
    patches = PatchSet("own engine", _own_engine.patches(Context(), MODULE, "Trainer"))
    patches.apply()
    assert module.LLM(model="elsewhere").arguments == {"model": "elsewhere"}
    assert Trainer("early").llm.arguments == {"model": "early"}  # it has no model yet
    assert patches.revert() == [] and module.LLM is Engine


def test_the_users_flag_is_remembered_while_it_is_held(module: types.ModuleType) -> None:
    """Two trainers from one config: the second is asked for sleep mode too, though the first has put the flag off."""
    config = SimpleNamespace(vllm_enable_sleep_mode=True)
    trainers = [SimpleNamespace(model=None, accelerator=None, args=config) for _ in range(2)]
    first = _own_engine.TrainerView(trainers[0], {})
    assert first.enable_sleep_mode
    first.enable_sleep_mode = False
    assert config.vllm_enable_sleep_mode is False
    second = _own_engine.TrainerView(trainers[1], {})
    assert second.enable_sleep_mode
    second.enable_sleep_mode = True
    assert config.vllm_enable_sleep_mode is True


def test_a_config_without_sleep_mode_never_gets_the_flag() -> None:
    config = SimpleNamespace()
    view = _own_engine.TrainerView(SimpleNamespace(model=None, accelerator=None, args=config), {})
    assert not view.enable_sleep_mode
    view.enable_sleep_mode = False
    assert vars(config) == {}
