"""The loss takes the log-probs that scoring computed: the same training with one forward pass less. Real rollouts."""

from __future__ import annotations

import contextlib
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl

import rlpatch

pytestmark = pytest.mark.cpu

if "vllm_importance_sampling_correction" not in {field.name for field in fields(trl.GRPOConfig)}:
    pytest.skip("this TRL scores rollouts without the trainer's log-probs", allow_module_level=True)


KEYS = ("loss", "grad_norm", "entropy", "reward", "sampling/sampling_logp_difference/mean", "kl")


LEFT = ("_rlpatch_scor", "_rlpatch_most", "_rlpatch_told")


def train(trainer_of: Any, one: bool, resume: Any = None, **job: Any) -> tuple[list[dict[str, Any]], int, Any]:
    """The logs, the model's forward passes and the trainer."""
    trainer = trainer_of(apply={"one_forward": one, "defaults": False}, **job)
    calls = []
    trainer.model.register_forward_pre_hook(lambda *_: calls.append(1))
    trainer.train(resume_from_checkpoint=resume)
    rows = [{k: row[k] for k in KEYS if k in row} for row in trainer.state.log_history if "loss" in row]
    rlpatch.revert()
    assert not any(name.startswith(LEFT) for name in vars(trainer))
    return rows, len(calls), trainer


CASES = {
    "plain": {},
    "checkpointing": {"config": {"gradient_checkpointing": True}},
    "no checkpointing": {"config": {"gradient_checkpointing": False}},
    "accumulation": {"config": {"gradient_accumulation_steps": 2, "steps_per_generation": 1}},
    "autocast": {"config": {"bf16": True}, "steps": 2},  # after which a token may come out differently, see below
    "reference": {"config": {"beta": 0.1}},
    "lora with reference": {"lora": {"r": 4}, "config": {"beta": 0.1}},
}


@pytest.mark.parametrize("case", list(CASES))
def test_the_same_training_with_a_forward_pass_less(trainer_of: Any, bare: None, case: str) -> None:
    job: dict[str, Any] = {"steps": 3, **CASES[case]}
    job["config"] = {"steps_per_generation": 1, **job.get("config", {})}
    rows, passes, trainer = train(trainer_of, True, **job)
    expected, before, _ = train(trainer_of, False, **job)
    batches = job["steps"] * trainer.args.gradient_accumulation_steps
    assert before - passes == batches
    assert len(rows) == len(expected) == job["steps"]
    rounding = 1e-3 if case == "autocast" else 2e-5  # TRL shuffles the rows, whose gradients bf16 adds up
    for row, other in zip(rows, expected, strict=True):
        assert row == pytest.approx(other, abs=rounding / 10, rel=rounding)


@pytest.mark.parametrize(
    "job",
    [
        {"config": {"steps_per_generation": 1, "num_iterations": 2}},
        {"config": {"steps_per_generation": 2, "gradient_accumulation_steps": 1}},
        {"config": {"steps_per_generation": 2, "gradient_accumulation_steps": 3}},
        {"config": {"steps_per_generation": 1}, "lora": {"r": 4, "lora_dropout": 0.1}},
        {"config": {"steps_per_generation": 1, "vllm_importance_sampling_correction": False}},
    ],
    ids=["iterations", "several steps", "not aligned", "dropout", "no correction"],
)
def test_left_alone(trainer_of: Any, bare: None, job: dict[str, Any]) -> None:
    passes = [train(trainer_of, one, steps=2, **job)[1] for one in (True, False)]
    assert passes[0] == passes[1] > 0


def test_a_loss_of_the_scripts_own(trainer_of: Any, bare: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may never ask for log-probs, and their graph would lie idle while it computes its own."""

    class Own(trl.GRPOTrainer):  # type: ignore[misc]
        def _compute_loss(self, model: Any, inputs: Any) -> Any:
            return super()._compute_loss(model, inputs)

    monkeypatch.setattr(trl, "GRPOTrainer", Own)
    passes = [train(trainer_of, one, steps=2, config={"steps_per_generation": 1})[1] for one in (True, False)]
    assert passes[0] == passes[1] > 0


def test_an_evaluation_in_between(trainer_of: Any, bare: None) -> None:
    trainer = trainer_of(apply={"one_forward": True, "defaults": False}, steps=1, config={"steps_per_generation": 1})
    trainer.train()
    calls: list[int] = []
    trainer.model.register_forward_pre_hook(lambda *_: calls.append(1))
    trainer.evaluate(trainer.train_dataset)
    assert len(calls) % 2 == 0 and not any(name.startswith("_rlpatch_scor") for name in vars(trainer))


def test_what_was_kept_goes_where_images_come() -> None:
    """Else two graphs would be there at once. No model here takes images: the adapter's own function, called."""
    from rlpatch.adapters.trl.one_forward_v0_23 import _KEPT, _logps

    class Trainer:
        pass

    def logps(model: Any, ids: Any, mask: Any, length: int, batch_size: Any = None, pixel_values: Any = None) -> str:
        return "wrapped"

    trainer = Trainer()
    vars(trainer)[_KEPT] = object()
    scored = (trainer, torch.ones(1), torch.ones(1), 1)
    assert _logps(logps, trainer, scored, {"pixel_values": torch.ones(1)}) == "wrapped"
    assert _KEPT not in vars(trainer)


@pytest.mark.parametrize("positional", [4, 5])
def test_only_the_policy_s_own_log_probs_are_kept(positional: int) -> None:
    """TRL 1.8 gives the batch size by position, 1.16 by name; a reference made of the same model comes after the policy."""
    from rlpatch.adapters.trl.one_forward_v0_23 import _ARMED, _KEPT, _logps

    policy = torch.ones(2, requires_grad=True)

    def logps(
        model: Any, ids: Any, mask: Any, length: int, batch_size: Any = None, compute_entropy: bool = False
    ) -> tuple[Any, Any]:
        return (policy * ids.sum(), None) if model.adapters else (torch.zeros(2), None)

    model = SimpleNamespace(adapters=True, is_gradient_checkpointing=False, parameters=lambda: [policy])
    trainer = SimpleNamespace(
        model=model,
        args=SimpleNamespace(gradient_checkpointing=False, steps_per_generation=1),
        state=SimpleNamespace(global_step=0),
        accelerator=SimpleNamespace(sync_gradients=True),
        compute_loss_context_manager=contextlib.nullcontext,
    )
    vars(trainer)[_ARMED] = True
    given = (model, torch.ones(2, 3), torch.ones(2, 3), 3, 2)
    call = (given[:positional], {} if positional == 5 else {"batch_size": 2})
    with torch.no_grad():
        assert not _logps(logps, trainer, *call)[0].requires_grad
        model.adapters = False
        assert not _logps(logps, trainer, *call)[0].any()
        model.adapters = True
    assert _KEPT in vars(trainer)
    found, _ = _logps(logps, trainer, given[:4], {"compute_entropy": True})
    assert found.requires_grad and found.tolist() == [6, 6] and _KEPT not in vars(trainer)


# ---- a rollout of several micro-batches ------------------------------------------------------------------------------


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``beside(n)``: n micro-batches may wait beside the first, as if a memory plan said so."""
    from rlpatch.adapters.trl import one_forward_v0_23 as adapter

    def set_to(count: int) -> None:
        monkeypatch.setattr(adapter, "_beside", lambda *_: count)

    return set_to


def several(steps: int, **config: Any) -> dict[str, Any]:
    """A rollout of `steps` micro-batches, all of them for one optimizer step."""
    accumulation = {"gradient_accumulation_steps": steps, "steps_per_generation": steps}
    return {"config": {"per_device_train_batch_size": 4, **accumulation, **config}}


SEVERAL: dict[str, tuple[int, dict[str, Any]]] = {  # those that wait beside the first
    "two": (1, several(2)),
    "two, the first waits": (0, several(2)),
    "four": (3, several(4)),
    "four, two wait": (1, several(4)),
    "four, the first waits": (0, several(4)),
    "two rollouts a step": (1, several(2, gradient_accumulation_steps=4)),
    "checkpointing": (3, several(4, gradient_checkpointing=True)),
    "reference": (1, several(2, beta=0.1)),
    "lora with reference": (3, {**several(4, beta=0.1), "lora": {"r": 4}}),
    "autocast": (1, several(2, bf16=True)),
}


@pytest.mark.parametrize("case", list(SEVERAL))
def test_micro_batches_of_one_step(trainer_of: Any, bare: None, beside: Any, case: str) -> None:
    """Each that waits saves a pass; what the loss takes is what its own pass would have been, bit for bit, and the old
    log-probs, whose rows TRL scores in other company, are so but for rounding."""
    wait, job = SEVERAL[case]
    job = {"steps": 3, **job}
    beside(wait)
    rows, passes, trainer = train(trainer_of, True, **job)
    expected, before, _ = train(trainer_of, False, **job)
    steps, accumulation = trainer.args.steps_per_generation, trainer.args.gradient_accumulation_steps
    assert before - passes == job["steps"] * accumulation // steps * (1 + wait)
    print(case, passes, before, [k for r, o in zip(rows, expected, strict=True) for k in r if r[k] != o[k]])
    assert len(rows) == len(expected) == job["steps"]
    for row, other in zip(rows, expected, strict=True):
        assert row == pytest.approx(other, abs=2e-6, rel=2e-5)
