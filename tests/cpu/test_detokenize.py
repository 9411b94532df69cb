"""Rollouts as token ids: the engine decodes nothing, and trains the same. Real rollouts."""

from __future__ import annotations

from typing import Any

import pytest

import rlpatch
from rlpatch import control
from rlpatch.errors import PatchError
from rlpatch.patching import Patch, PatchSet

pytestmark = pytest.mark.cpu

pytest.importorskip("trl.generation.vllm_generation", reason="this TRL generates inside of its trainer")


def asked_and_got(trainer: Any) -> list[tuple[bool, str, Any]]:
    """Per completion: vLLM's ``detokenize``, the text, and what the first log-prob was decoded to."""
    seen = []

    def generate(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        outputs = wrapped(*args, **kwargs)
        params = kwargs.get("sampling_params", args[1] if len(args) > 1 else None)
        for completion in (one for output in outputs for one in output.outputs):
            (first, *_) = completion.logprobs[0].values()
            seen.append((params.detokenize, completion.text, first.decoded_token))
        return outputs

    patches = PatchSet("seen", [Patch("vllm.entrypoints.llm", "LLM.generate", generate)])
    patches.apply()
    try:
        trainer.train()
    finally:
        patches.revert()
    return seen


def rows(trainer: Any) -> list[tuple[Any, ...]]:
    return [(row["loss"], row["reward"]) for row in trainer.state.log_history if "loss" in row]


def test_nothing_is_decoded_and_all_is_the_same(trainer_of: Any) -> None:
    trainer = trainer_of(apply={"defaults": False}, steps=2)
    seen = asked_and_got(trainer)
    assert seen and set(seen) == {(False, "", None)}
    assert "detokenize" not in trainer.vllm_generation.generation_kwargs
    found = rows(trainer)
    rlpatch.revert()
    trainer = trainer_of(apply={"defaults": False, "exclude": ["detokenize"]}, steps=2)
    assert all(detokenize and text and token for detokenize, text, token in asked_and_got(trainer))
    assert rows(trainer) == [pytest.approx(row, abs=1e-6) for row in found]


def test_a_capability_is_switched_while_all_else_goes_on(trainer_of: Any) -> None:
    """What ``bench --in-turn`` does between steps."""
    trainer = trainer_of(apply={"defaults": False}, steps=1)
    control.switch("detokenize", False)
    assert all(detokenize for detokenize, _, _ in asked_and_got(trainer))
    control.switch("detokenize", True)
    assert not any(detokenize for detokenize, _, _ in asked_and_got(trainer))
    for name in ("nothing", "rollout_gc"):  # the second wraps nothing of its own
        with pytest.raises(PatchError, match=f"{name} cannot be switched"):
            control.switch(name, False)


@pytest.mark.parametrize("given", [{"stop": ["w3"]}, {"detokenize": True}])
def test_text_that_is_asked_for(trainer_of: Any, given: dict[str, Any]) -> None:
    trainer = trainer_of(apply={"defaults": False}, steps=1, config={"generation_kwargs": given})
    seen = asked_and_got(trainer)
    assert seen and all(detokenize for detokenize, _, _ in seen)
    if "stop" in given:
        assert all("w3 " not in text for _, text, _ in seen)
