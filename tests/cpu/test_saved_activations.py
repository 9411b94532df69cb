"""Gradient checkpointing only where memory asks for it: the same training, with layers computed once. Real rollouts.

A CPU has no memory of its own to plan with, so a size is given to it: ``apply(memory_plan="4GiB")``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback

import rlpatch
from rlpatch import phases
from rlpatch.demo import worker

pytestmark = [pytest.mark.cpu, pytest.mark.timeout(600)]

if not trl.GRPOConfig.__dataclass_fields__["gradient_checkpointing"].default:
    pytest.skip("this TRL does not checkpoint by default", allow_module_level=True)
KEYS = ("loss", "grad_norm", "entropy", "reward", "sampling/sampling_logp_difference/mean")


@dataclass
class Run:
    """What a training came to.

    Attributes:
        rows: Of the log.
        passes: Of the model, forward.
        layers: Calls of its first layer's MLP, recomputed ones included.
        left: Attributes of rlpatch's that the trainer still has.
    """

    rows: list[dict[str, Any]]
    passes: int
    layers: int
    left: list[str]


Train = Callable[..., Run]


@pytest.fixture
def train(tiny_model: str, tmp_path: Path, bare: None) -> Iterator[Train]:
    def run(
        prepare: Callable[[Any], None] | None = None, apply: dict[str, Any] | None = None, kind: str = "GRPO",
        lora: int = 0, engine: dict[str, Any] | None = None, **fields: Any,
    ) -> Run:  # fmt: skip
        rlpatch.apply(**{"memory_plan": "4GiB", "defaults": False, "one_forward": False, **(apply or {})})
        patches = worker.engine_defaults(dtype="float32", enforce_eager=True, **(engine or {}))
        patches.apply()
        more: dict[str, Any] = {}
        if lora:
            from peft import LoraConfig

            more["peft_config"] = LoraConfig(r=lora, target_modules="all-linear", task_type="CAUSAL_LM")
        settings = {
            "output_dir": str(tmp_path), "use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": 144,
            "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 24, "max_steps": 2,
            "save_strategy": "no", "report_to": [], "use_cpu": True, "bf16": False, "learning_rate": 1e-3,
            "disable_tqdm": True, "logging_steps": 1, "seed": 3, "gradient_accumulation_steps": 2, **fields,
        }  # fmt: skip
        try:
            trainer = getattr(trl, f"{kind}Trainer")(
                model=AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32),
                args=getattr(trl, f"{kind}Config")(**settings),
                reward_funcs=worker.reward_target_words,
                train_dataset=Dataset.from_dict({"prompt": ["w1 w2 w3"] * 8}),
                **more,
            )
        finally:
            patches.revert()
        passes: list[int] = []
        layers: list[int] = []
        trainer.model.register_forward_pre_hook(lambda *_: passes.append(1))
        # A part of it: newer releases of transformers checkpoint a layer's `forward`, past the hooks of the layer itself.
        first = next(m for name, m in trainer.model.named_modules() if name.endswith("layers.0.mlp"))
        first.register_forward_pre_hook(lambda *_: layers.append(1))
        if prepare is not None:
            prepare(trainer)
        trainer.train()
        assert trainer.model.is_gradient_checkpointing == trainer.args.gradient_checkpointing
        rows = [{k: row[k] for k in KEYS if k in row} for row in trainer.state.log_history if "loss" in row]
        left = [name for name in vars(trainer) if name.startswith("_rlpatch_no_room")]
        rlpatch.revert()
        return Run(rows, len(passes), len(layers), left)

    yield run
    rlpatch.revert()


def only_to(tokens: int) -> Callable[[Any], None]:
    """As if the plan had room for passes of so many tokens a row."""

    def prepare(trainer: Any) -> None:
        (pair,) = phases.live()
        assert pair.memory is not None and pair.memory.saving is not None
        pair.memory = replace(pair.memory, saving=replace(pair.memory.saving, training_context=tokens))

    return prepare


CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora": 4},
    "one_forward left alone": {"apply": {"one_forward": True}, "num_iterations": 2},
    "iterations": {"gradient_accumulation_steps": 1, "num_iterations": 2},
    "RLOO": {"kind": "RLOO"},
}


@pytest.mark.parametrize("case", list(CASES))
def test_the_same_training_with_no_layer_computed_twice(train: Train, case: str) -> None:
    job = dict(CASES[case])
    apply = job.pop("apply", {})
    saved = train(apply=apply, **job)
    plain = train(apply={**apply, "exclude": "saved_activations"}, **job)
    backward = 2 * job.get("gradient_accumulation_steps", 2)
    assert saved.layers == saved.passes
    assert plain.layers == plain.passes + backward
    assert saved.passes == plain.passes
    assert saved.rows == plain.rows and len(saved.rows) == 2  # bit for bit


def test_each_pass_goes_by_its_own_length(train: Train) -> None:
    """Three tokens of prompt; the second rollout is longer than there is room for."""
    lengths = iter([8, 20, 8])

    def rollouts(trainer: Any) -> None:
        only_to(16)(trainer)
        owner = getattr(trainer, "vllm_generation", trainer)
        generate = owner.generate

        def short(*args: Any, **kwargs: Any) -> Any:
            owner.max_completion_length = next(lengths)
            return generate(*args, **kwargs)

        owner.generate = short

    if not hasattr(trl, "generation"):
        pytest.skip("this TRL's trainer generates by itself")
    found = train(rollouts, max_steps=3, generation_kwargs={"ignore_eos": True})
    assert found.layers == found.passes + 2


def test_a_plan_without_room_changes_nothing(train: Train) -> None:
    assert train(only_to(8)) == train(apply={"exclude": "saved_activations"})


@pytest.mark.parametrize(
    "job",
    [
        {"gradient_checkpointing": True},
        {"apply": {"memory_plan": False}},
        {"apply": {"standby": False}, "engine": {"kv_cache_memory_bytes": 16 << 20}},
        {"apply": {"one_forward": True}},
    ],
    ids=["given", "no plan", "no standby", "what waits"],
)
def test_left_alone(train: Train, job: dict[str, Any]) -> None:
    found = train(**job)
    assert found.layers == found.passes + 4


def test_beside_a_kv_cache_that_is_there(train: Train) -> None:
    """Somebody restored it after the rollout: the plan has no room for both."""

    def restoring(trainer: Any) -> None:
        (pair,) = phases.live()
        assert pair.standby is not None
        standby, owner = pair.standby, getattr(trainer, "vllm_generation", trainer)
        name = "generate" if owner is not trainer else "_generate_single_turn"
        generate = getattr(owner, name)

        def generated(*args: Any, **kwargs: Any) -> Any:
            if not standby.released:
                standby.release()
            found = generate(*args, **kwargs)
            standby.restore()
            return found

        setattr(owner, name, generated)

    found = train(restoring)
    assert found.layers == found.passes + 4


def test_beside_graphs_that_wait(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights changed under three graphs that wait, so that passes are made again: what waits is not in their plan."""
    from rlpatch.adapters.trl import one_forward_v0_23

    monkeypatch.setattr(one_forward_v0_23, "_beside", lambda *_: 2)

    class Changes(TrainerCallback):  # type: ignore[misc]
        def on_substep_end(self, *_: Any, model: Any, **__: Any) -> None:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.01)

    found = train(
        lambda trainer: trainer.add_callback(Changes()), apply={"one_forward": True}, gradient_accumulation_steps=3
    )
    # of each rollout the graph that was taken, and the pass beside which the third one waits; nothing waits beside the last
    assert found.layers == found.passes + 2 * 2 and found.passes == 2 * (3 + 2)


def test_a_single_pass_is_left_alone(train: Train) -> None:
    """What it would gain goes with the memory that comes and goes."""
    found = train(gradient_accumulation_steps=1)
    assert found.layers == found.passes + 2


def test_a_trainer_that_does_not_checkpoint(train: Train) -> None:
    found = train(gradient_checkpointing=False)
    assert found.layers == found.passes


def test_out_of_memory_in_the_forward_pass(train: Train, caplog: pytest.LogCaptureFixture) -> None:
    """The first pass that saves finds no room: it is made again with checkpoints, and so are all to come."""

    def failing(trainer: Any) -> None:
        last = [m for name, m in trainer.model.named_modules() if name.endswith("layers.1")][-1]
        calls: list[int] = []

        def fail(*_: Any) -> None:
            if torch.is_grad_enabled() and not calls:
                calls.append(1)
                raise torch.OutOfMemoryError("full")

        last.register_forward_pre_hook(fail)

    found = train(failing)
    plain = train(apply={"exclude": "saved_activations"})
    assert found.rows == plain.rows and not found.left
    assert (found.passes, found.layers) == (plain.passes + 1, plain.layers + 1)
    assert caplog.text.count("out of memory in a forward pass of 4 × ") == 1


def test_no_other_error_is_swallowed(train: Train) -> None:
    def failing(trainer: Any) -> None:
        def fail(*_: Any) -> None:
            if torch.is_grad_enabled():
                raise RuntimeError("no memory")

        trainer.model.register_forward_pre_hook(fail)

    with pytest.raises(RuntimeError, match="no memory"):
        train(failing)
