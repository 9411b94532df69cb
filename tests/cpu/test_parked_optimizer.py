"""`park_optimizer` under real trainers. The CPU stands for the device too: parked is what lies in the parking's memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import rlpatch
from rlpatch import parking, phases
from rlpatch.memory.budget import Room

KEYS = ("loss", "grad_norm", "reward", "entropy")


@pytest.fixture
def everything_parks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parking.ParkedState.__init__, "__defaults__", (lambda tensor: True, 64))


def train(
    trainer_of: Any, park: bool | str, precision: str = "as-is", resume: Any = None, **job: Any
) -> tuple[list[Any], list[int]]:
    """The logs, and the bytes parked at each rollout."""
    trainer = trainer_of(apply={"park_optimizer": park, "precision": precision, "defaults": False}, **job)
    at_rollouts: list[int] = []
    generate = trainer.vllm_generation.generate

    def watched(*args: Any, **kwargs: Any) -> Any:
        at_rollouts.append(sum(state.parked_bytes for state in parking._live))
        return generate(*args, **kwargs)

    trainer.vllm_generation.generate = watched
    trainer.train(resume_from_checkpoint=resume)
    rlpatch.revert()
    assert not any(state.parked_bytes for state in parking._live)  # all of it is back
    parking._live.clear()
    return [{k: row[k] for k in KEYS if k in row} for row in trainer.state.log_history if "loss" in row], at_rollouts


@pytest.mark.parametrize("precision", ["as-is", "masters"])
@pytest.mark.usefixtures("everything_parks", "bare")
def test_the_same_training(trainer_of: Any, precision: str) -> None:
    job: dict[str, Any] = {"steps": 3, "config": {"bf16": precision == "masters"}}
    plain, before = train(trainer_of, False, precision, **job)
    rows, parked = train(trainer_of, True, precision, **job)
    assert rows == plain and len(rows) == 3
    assert not any(before)
    assert parked[0] == 0 and len(set(parked[1:])) == 1 and parked[1] > 0


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.usefixtures("everything_parks", "bare")
def test_the_plan_decides(trainer_of: Any, monkeypatch: pytest.MonkeyPatch, wanted: bool) -> None:
    decide = phases.decide_memory
    modes = []

    def decided(budget: Any, *args: Any) -> Any:
        modes.append(budget.parking)
        return replace(decide(budget, *args), parked=wanted)

    monkeypatch.setattr(phases, "decide_memory", decided)
    monkeypatch.setattr(phases, "_room", lambda *_: Room(8 << 30, host=8 << 30))
    _, parked = train(trainer_of, "auto", steps=2)
    assert modes == ["auto"]
    assert bool(parked[1]) is wanted


@pytest.mark.usefixtures("everything_parks", "bare")
def test_a_checkpoint_resumed(trainer_of: Any, tmp_path: Path) -> None:
    config = {"save_strategy": "steps", "save_steps": 2, "output_dir": str(tmp_path / "parked")}
    whole, _ = train(trainer_of, True, steps=4, config=config)
    checkpoint = str(tmp_path / "parked" / "checkpoint-2")
    again, _ = train(trainer_of, True, steps=4, resume=checkpoint, config={"output_dir": str(tmp_path / "again")})
    without, _ = train(trainer_of, False, steps=4, resume=checkpoint, config={"output_dir": str(tmp_path / "without")})
    assert again[-2:] == without[-2:] == whole[-2:]


@pytest.mark.usefixtures("everything_parks", "bare")
def test_a_trainer_without_an_engine_is_left_alone(trainer_of: Any, tiny_model: str, tmp_path: Path) -> None:
    import trl
    from datasets import Dataset

    rlpatch.apply(park_optimizer=True, defaults=False)
    config = trl.SFTConfig(output_dir=str(tmp_path), max_steps=2, report_to=[], use_cpu=True, bf16=False)
    trainer = trl.SFTTrainer(tiny_model, args=config, train_dataset=Dataset.from_dict({"text": ["a b c"] * 8}))
    trainer.train()
    assert not list(parking._live)
