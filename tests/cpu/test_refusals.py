"""Trainers that cannot share say why. Their accelerators are stand-ins: FSDP, DeepSpeed and tensor parallelism need
several devices, which this tier does not have; what is under test is the decision alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlpatch.adapters.trl import _pairing
from rlpatch.registry import Context

pytestmark = pytest.mark.cpu


def refusal(generation: Any) -> str | None:
    """The decision where no adapter brings quantized weights, as on this tier's vLLM releases."""
    return _pairing.refusal(Context(), generation)


def generation(**changes: Any) -> SimpleNamespace:
    """What the decision looks at, for a trainer that can share."""
    accelerator = SimpleNamespace(distributed_type=SimpleNamespace(value=changes.pop("distributed", "NO")))
    model = torch.nn.Linear(2, 2)
    for name, value in changes.pop("model", {}).items():
        setattr(model, name, value)
    return SimpleNamespace(**{"tensor_parallel_size": 1, "accelerator": accelerator, "model": model, **changes})


def test_an_ordinary_trainer_shares() -> None:
    assert refusal(generation()) is None
    assert refusal(generation(distributed="MULTI_GPU")) is None  # plain data parallelism: each rank its own pair


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"tensor_parallel_size": 2}, "vllm_tensor_parallel_size=2"),
        ({"distributed": "FSDP"}, "FSDP"),
        ({"distributed": "DEEPSPEED"}, "DEEPSPEED"),
        ({"model": {"hf_quantizer": object()}}, "quantized"),
    ],
)
def test_what_cannot_share_is_named(changes: dict[str, Any], named: str) -> None:
    assert named in (refusal(generation(**changes)) or "")


def test_a_refused_pair_loads_and_pushes_as_usual(trainer_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal known before construction: the engine is an ordinary one, standby works, training goes on."""
    from accelerate.utils import DistributedType

    from rlpatch import phases

    monkeypatch.setattr(
        "accelerate.Accelerator.distributed_type", property(lambda self: DistributedType.MEGATRON_LM), raising=True
    )
    made: list[Any] = []
    original = phases.Colocation.joined

    def joined(self: Any, llm: Any) -> None:
        monkeypatch.undo()
        made.append(self)
        original(self, llm)

    monkeypatch.setattr(phases.Colocation, "joined", joined)
    trainer = trainer_of(steps=2)
    pair = made[0]
    assert pair.sharing is None and "MEGATRON_LM" in pair.refusal
    assert trainer.vllm_generation.llm.llm_engine.vllm_config.load_config.load_format == "auto"
    assert pair.standby is not None and pair.standby.released
    trainer.train()
    assert (
        max(row["sampling/sampling_logp_difference/mean"] for row in trainer.state.log_history if "loss" in row) < 2e-6
    )
