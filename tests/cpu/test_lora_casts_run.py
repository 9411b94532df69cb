"""GRPO with a LoRA under autocast, with PEFT's casts of the adapters' inputs and without: the same adapters bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import rlpatch

pytestmark = [pytest.mark.cpu, pytest.mark.timeout(600)]

lora = pytest.importorskip("peft.tuners.lora.layer")
if not hasattr(lora.Linear, "_cast_input_dtype"):
    pytest.skip("PEFT before 0.15 casts in the line itself", allow_module_level=True)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_real_training_is_bit_for_bit_the_same(
    trainer_of: Any, bare: None, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    """Three steps of rollouts, scoring and training; a bfloat16 model object under ``bf16=True``."""
    from rlpatch.adapters.peft import lora_casts_v0_15 as adapter

    left_out: list[bool] = []
    is_plain = adapter._is_plain

    def counted(layer: Any, watched: bool = False) -> bool:
        found = is_plain(layer, watched)
        if watched:
            left_out.append(found)
        return found

    monkeypatch.setattr(adapter, "_is_plain", counted)

    def train(**apply: Any) -> tuple[dict[str, Any], list[Any], int]:
        left_out.clear()
        trainer = trainer_of(
            apply=apply, dtype="bfloat16", steps=3, lora={"r": 4},
            config={"bf16": True, "gradient_checkpointing": checkpointing, "learning_rate": 1e-2},
        )  # fmt: skip
        state = str(rlpatch.status()["lora_casts"].state)
        assert state == ("skipped" if apply else "applied")
        trainer.train()
        weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "lora_" in n}
        assert {p.dtype for p in weights.values()} == {torch.float32}
        logs = [
            {k: row[k] for k in ("loss", "grad_norm", "reward")} for row in trainer.state.log_history if "loss" in row
        ]
        rlpatch.revert()
        assert not left_out or all(left_out)
        return weights, logs, len(left_out)

    expected, before, none = train(exclude=["lora_casts"])
    found, after, many = train()
    assert none == 0 and many >= 3 * len(found) // 2  # a forward pass each, at least
    assert before == after and any(row["grad_norm"] > 0 for row in before)
    assert list(found) == list(expected)
    assert not [name for name in found if not torch.equal(found[name], expected[name])]
    assert all(weight.any() for weight in found.values())  # B started at zero


@pytest.mark.parametrize(
    ("apply", "adapter", "casts"),
    [({}, {}, False), ({"exclude": ["lora_casts"]}, {}, True), ({}, {"lora_dropout": 0.1}, True), ({}, {"r": 0}, True)],
    ids=["in force", "excluded", "dropout", "no adapter"],
)
def test_the_plan_knows(
    trainer_of: Any, bare: None, monkeypatch: pytest.MonkeyPatch, apply: Any, adapter: Any, casts: bool
) -> None:
    from rlpatch import phases

    planned: list[Any] = []
    decide = phases.decide_memory

    def decided(budget: Any, *args: Any) -> Any:
        planned.append(budget.input_casts)
        return decide(budget, *args)

    monkeypatch.setattr(phases, "decide_memory", decided)
    trainer_of(
        apply={"memory_plan": 1400 << 20, **apply}, dtype="bfloat16", config={"bf16": True},
        lora={} if adapter.get("r") == 0 else {"r": 4, **adapter},
    )  # fmt: skip
    assert planned == [casts]
