"""The loss takes the log-probs that scoring computed: the same training with one forward pass less. Real rollouts."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl
from transformers import TrainerCallback

import rlpatch
from rlpatch.demo import worker

pytestmark = pytest.mark.cpu

if "vllm_importance_sampling_correction" not in {field.name for field in fields(trl.GRPOConfig)}:
    pytest.skip("this TRL scores rollouts without the trainer's log-probs", allow_module_level=True)


KEYS = ("loss", "grad_norm", "entropy", "reward", "sampling/sampling_logp_difference/mean", "kl")


LEFT = ("_rlpatch_scor", "_rlpatch_most", "_rlpatch_told")


def train(
    trainer_of: Any, one: bool, resume: Any = None, prepare: Any = None, **job: Any
) -> tuple[list[dict[str, Any]], int, Any]:
    """The logs, the model's forward passes and the trainer."""
    trainer = trainer_of(apply={"one_forward": one, "defaults": False}, **job)
    calls: list[int] = []
    trainer.model.register_forward_pre_hook(lambda *_: calls.append(1))
    if prepare is not None:
        prepare(trainer, calls)
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


def test_the_second_trainer_of_a_process_is_like_the_first(trainer_of: Any, bare: None) -> None:
    """Plain TRL leaves RANK and its kin behind, for which accelerate wraps the next model in DistributedDataParallel."""
    passes, left = [], []
    for _ in range(2):
        _, count, trainer = train(trainer_of, True, steps=2, config={"steps_per_generation": 1})
        passes.append(count)
        left.append({"RANK", "LOCAL_RANK", "WORLD_SIZE"} & set(os.environ))
        assert trainer.model_wrapped is trainer.model and str(trainer.accelerator.distributed_type.value) == "NO"
    assert passes[0] == passes[1] and left == [set(), set()]


def test_what_a_launcher_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    from rlpatch.adapters.trl._pairing import alone

    launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    for kind, left in (("MULTI_GPU", launched), ("NO", {})):
        with alone(SimpleNamespace(accelerator=SimpleNamespace(distributed_type=kind))):
            pass
        assert {name: os.environ[name] for name in launched if name in os.environ} == left


def test_what_was_kept_goes_where_images_come() -> None:
    """Else two graphs would be there at once. No model here takes images: the adapter's own function, called."""
    from rlpatch.adapters.trl.one_forward_v0_23 import WAITING, _logps

    class Trainer:
        pass

    def logps(
        model: Any, input_ids: Any, attention_mask: Any, logits_to_keep: int, batch_size: Any = None,
        pixel_values: Any = None,
    ) -> str:  # fmt: skip
        return "wrapped"

    trainer = Trainer()
    vars(trainer)[WAITING] = object()
    scored = (trainer, torch.ones(1), torch.ones(1), 1)
    assert _logps(logps, trainer, scored, {"pixel_values": torch.ones(1)}) == "wrapped"
    assert WAITING not in vars(trainer)


@pytest.mark.parametrize("positional", [4, 5])
def test_only_the_policy_s_own_log_probs_are_kept(positional: int) -> None:
    """TRL 1.8 gives the batch size by position, 1.16 by name; a reference made of the same model comes after the policy."""
    from rlpatch.adapters.trl.one_forward_v0_23 import _ARMED, WAITING, _logps

    policy = torch.ones(2, requires_grad=True)

    def logps(
        model: Any, input_ids: Any, attention_mask: Any, logits_to_keep: int, batch_size: Any = None,
        compute_entropy: bool = False,
    ) -> tuple[Any, Any]:  # fmt: skip
        return (policy * input_ids.sum(), None) if model.adapters else (torch.zeros(2), None)

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
    assert WAITING in vars(trainer)
    found, _ = _logps(logps, trainer, given[:4], {"compute_entropy": True})
    assert found.requires_grad and found.tolist() == [6, 6] and WAITING not in vars(trainer)


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
    """Each that waits saves a pass. What the loss takes is what its own pass would have been, bit for bit; the old
    log-probs, whose rows TRL scores in other company, may round otherwise (they did not where this was written)."""
    wait, job = SEVERAL[case]
    job = {"steps": 3, **job}
    beside(wait)
    rows, passes, trainer = train(trainer_of, True, **job)
    expected, before, _ = train(trainer_of, False, **job)
    steps, accumulation = trainer.args.steps_per_generation, trainer.args.gradient_accumulation_steps
    assert before - passes == job["steps"] * accumulation // steps * (1 + wait)
    assert len(rows) == len(expected) == job["steps"]
    for row, other in zip(rows, expected, strict=True):
        assert row == pytest.approx(other, abs=2e-6, rel=2e-5)


def alike(rows: list[dict[str, Any]], expected: list[dict[str, Any]]) -> bool:
    return len(rows) == len(expected) > 0 and all(
        row == pytest.approx(other, abs=2e-6, rel=2e-5) for row, other in zip(rows, expected, strict=True)
    )


def test_another_order_than_foretold(
    trainer_of: Any, bare: None, beside: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A reward function draws from the generator that shuffles: the loss runs the model on what it really gets."""
    reward = worker.reward_target_words

    def drawing(completion_ids: list[list[int]], **_: Any) -> list[float]:
        torch.rand(3)
        return reward(completion_ids)

    monkeypatch.setattr(worker, "reward_target_words", drawing)
    beside(3)
    job = {"steps": 2, **several(4)}
    with caplog.at_level(logging.INFO, "rlpatch"):
        rows, passes, _ = train(trainer_of, True, **job)
    expected, before, _ = train(trainer_of, False, **job)
    assert passes == before == 2 * (4 + 4) and alike(rows, expected)
    assert caplog.text.count("the loss asks for other completions than were foretold") == 1


def failing(at: int, error: Exception) -> Callable[[Any, list[int]], None]:
    """The model's forward pass number `at` raises `error`."""

    def prepare(trainer: Any, calls: list[int]) -> None:
        def fail(*_: Any) -> None:
            if len(calls) == at:
                raise error

        trainer.model.register_forward_pre_hook(fail)

    return prepare


def test_out_of_memory_while_scoring(
    trainer_of: Any, bare: None, beside: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Of four graphs the third finds no room: this rollout is TRL's, and of the next ones one waits."""
    beside(3)
    job = {"steps": 3, **several(4)}
    rows, passes, _ = train(trainer_of, True, prepare=failing(3, torch.OutOfMemoryError("full")), **job)
    expected, before, _ = train(trainer_of, False, **job)
    assert before == 3 * 8 and passes == (3 + 4 + 4) + 2 * (4 + 3) and alike(rows, expected)
    assert caplog.text.count("out of memory in a forward pass while 2 others waited") == 1


def test_out_of_memory_beside_what_waits(trainer_of: Any, bare: None, beside: Any) -> None:
    """The reference model's pass finds no room for itself: what waits goes, and the pass is made once more."""
    beside(1)
    job = {"steps": 2, **several(2, beta=0.1), "lora": {"r": 4}}
    rows, passes, _ = train(trainer_of, True, prepare=failing(3, torch.OutOfMemoryError("full")), **job)
    expected, before, _ = train(trainer_of, False, **job)
    assert before == 2 * 6 and passes == (2 + 1 + 2 + 2) + (2 + 2 + 1) and alike(rows, expected)


@pytest.mark.parametrize("at", [1, 2])
def test_no_other_error_is_swallowed(trainer_of: Any, bare: None, beside: Any, at: int) -> None:
    beside(1)
    trainer = trainer_of(apply={"one_forward": True, "defaults": False}, **several(2))
    calls: list[int] = []
    trainer.model.register_forward_pre_hook(lambda *_: calls.append(1))
    failing(at, RuntimeError("no memory"))(trainer, calls)
    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    with pytest.raises(RuntimeError, match="no memory"):
        trainer._prepare_inputs(batch)
    assert len(calls) == at and not any(name.startswith(LEFT) for name in vars(trainer))


def test_a_reward_function_fails(trainer_of: Any, bare: None, beside: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def fails(**_: Any) -> list[float]:
        seen.append("_rlpatch_scored" in vars(trainer))
        raise ValueError("no reward")

    monkeypatch.setattr(worker, "reward_target_words", fails)
    beside(1)
    trainer = trainer_of(apply={"one_forward": True, "defaults": False}, **several(2))
    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    with pytest.raises(ValueError, match="no reward"):
        trainer._prepare_inputs(batch)
    assert seen == [True] and "_rlpatch_scored" not in vars(trainer)


class Between(TrainerCallback):  # type: ignore[misc]
    """Does something between two micro-batches of a step, and notes how many wait before and after it."""

    def __init__(self, trainer: Any, act: Callable[[Any], Any]) -> None:
        self.trainer, self.act = trainer, act
        self.before: list[int] = []
        self.after: list[int] = []

    def waiting(self) -> int:
        kept = vars(self.trainer).get("_rlpatch_scored")
        return 0 if kept is None else len(kept.batches)

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        self.before.append(self.waiting())
        self.act(self.trainer)
        self.after.append(self.waiting())


def between(act: Callable[[Any], Any], made: list[Between]) -> Callable[[Any, list[int]], None]:
    def prepare(trainer: Any, calls: list[int]) -> None:
        made.append(Between(trainer, act))
        trainer.add_callback(made[-1])

    return prepare


def test_an_exception_between_micro_batches(trainer_of: Any, bare: None, beside: Any) -> None:
    def stop(trainer: Any) -> None:
        raise KeyboardInterrupt

    beside(1)
    made: list[Between] = []
    trainer = trainer_of(apply={"one_forward": True, "defaults": False}, **several(2))
    between(stop, made)(trainer, [])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert made[0].before == [1] and not any(name.startswith(LEFT) for name in vars(trainer))


def evaluation(trainer: Any) -> None:
    trainer.evaluate()


def change(trainer: Any) -> None:
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(1.01)


@pytest.mark.parametrize("act", [evaluation, change])
def test_what_waits_gives_way(trainer_of: Any, bare: None, beside: Any, act: Callable[[Any], Any]) -> None:
    """An evaluation has the memory to itself; log-probs of weights that are gone are not used (autograd would refuse)."""
    beside(1)
    made: list[Between] = []
    job = {"steps": 2, "prepare": between(act, made), **several(2)}
    rows, passes, _ = train(trainer_of, True, **job)
    expected, before, _ = train(trainer_of, False, **job)
    assert made[0].before == [1, 1] and made[0].after == ([0, 0] if act is evaluation else [1, 1])
    assert before - passes == 2 and alike(rows, expected)  # the first of each step


def test_nothing_waits_for_the_optimizer(trainer_of: Any, bare: None, beside: Any) -> None:
    """Each graph goes with its micro-batch."""
    beside(3)
    made: list[Between] = []
    train(trainer_of, True, steps=2, prepare=between(lambda _: None, made), **several(4))
    assert made[0].before == [3, 2, 1] * 2


def test_a_training_goes_on(trainer_of: Any, bare: None, beside: Any, tmp_path: Path) -> None:
    """From a checkpoint of a plain run."""
    beside(1)
    job = several(2, save_strategy="steps", save_steps=2)
    train(trainer_of, False, steps=2, output=str(tmp_path), **job)
    job = {"steps": 4, "resume": str(tmp_path / "checkpoint-2"), **several(2)}
    rows, passes, _ = train(trainer_of, True, **job)
    expected, before, _ = train(trainer_of, False, **job)
    assert before == 2 * 4 and passes == 2 * 2 and alike(rows, expected)


def test_what_passes_were_seen_to_keep(trainer_of: Any, bare: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device it counts for the next ones. No CPU tells it: its memory is a stand-in that grows by 7, then by 9."""
    from rlpatch.adapters.trl import one_forward_v0_23 as adapter

    assert adapter._allocated(torch.device("cpu")) == 0
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "memory_allocated", lambda device: 5)
        assert adapter._allocated(torch.device("cuda")) == 5
    memory, seen = iter([100, 107, 116]), []

    def beside(trainer: Any, tokens: int, each: int) -> int:
        seen.append(each)
        return 1

    monkeypatch.setattr(adapter, "_allocated", lambda device: next(memory))
    monkeypatch.setattr(adapter, "_beside", beside)
    _, passes, _ = train(trainer_of, True, steps=1, **several(4))
    assert seen == [7, 8] and passes == 4 + 2
