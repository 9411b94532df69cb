"""Which precision is chosen, from facts alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import rlpatch
from rlpatch.errors import UsageError
from rlpatch.precision.choice import AS_IS, BASE, MASTERS, Facts, choose

PLAIN = Facts(from_path=True, checkpoint="bfloat16")  # GRPOTrainer(model="org/name", args=GRPOConfig(bf16=True, …))
OBJECT = Facts(from_path=False)


@pytest.mark.parametrize(
    ("changes", "mode"),
    [
        ({}, MASTERS),
        ({"checkpoint": "float32"}, MASTERS),
        ({"checkpoint": None}, MASTERS),
        ({"adapters": True}, BASE),
        ({"adapters": True, "checkpoint": "float32"}, AS_IS),
        ({"adapters": True, "optimizer": "galore_adamw_layerwise"}, BASE),
        ({"checkpoint": "float16"}, AS_IS),
        ({"dtype": "float32", "chosen": True}, AS_IS),
        ({"dtype": "bfloat16", "chosen": True}, AS_IS),
        ({"autocast": None}, AS_IS),
        ({"autocast": "float16"}, AS_IS),
        ({"colocated": False}, AS_IS),
        ({"cannot_share": "share_weights is off"}, AS_IS),
        ({"owner": "DeepSpeed"}, AS_IS),
        ({"owner": "FSDP"}, AS_IS),
        ({"optimizer": "lomo"}, AS_IS),
        ({"optimizer": "schedule_free_adamw"}, AS_IS),
        ({"own_optimizer": True}, AS_IS),
        ({"unreachable": "transformers 3 is too old"}, AS_IS),
        ({"optimizer": "adamw_8bit"}, MASTERS),
        ({"optimizer": "adafactor"}, MASTERS),
    ],
)
def test_a_path_under_auto(changes: dict[str, Any], mode: str) -> None:
    choice = choose("auto", replace(PLAIN, **changes))
    assert choice.mode == mode
    assert choice.reason


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_object_is_the_scripts_own_choice(dtype: str) -> None:
    choice = choose("auto", replace(OBJECT, dtype=dtype))
    assert choice.mode == AS_IS
    assert choice.wanted == (dtype == "float32")
    assert ("precision='masters'" in choice.reason) == (dtype == "float32")


@pytest.mark.parametrize(
    ("facts", "mode"),
    [
        (OBJECT, MASTERS),
        (replace(OBJECT, dtype="bfloat16", autocast=None), MASTERS),
        (replace(OBJECT, adapters=True), BASE),
        (replace(PLAIN, chosen=True, dtype="bfloat16"), MASTERS),
        (replace(PLAIN, adapters=True, checkpoint="float32"), BASE),
        (replace(PLAIN, colocated=False), MASTERS),
    ],
)
def test_masters_by_name_overrule_what_was_given(facts: Facts, mode: str) -> None:
    assert choose("masters", facts).mode == mode


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"owner": "DeepSpeed"}, "DeepSpeed keeps"),
        ({"autocast": "float16"}, "fp16=True"),
        ({"autocast": None}, "bf16=False"),
        ({"optimizer": "lomo"}, "optim='lomo'"),
        ({"optimizer": "galore_adamw_layerwise"}, "optim='galore_adamw_layerwise'"),
        ({"own_optimizer": True}, "optimizer that holds the parameters"),
        ({"unreachable": "no adapter"}, "no adapter"),
    ],
)
def test_masters_by_name_are_an_error_where_they_cannot_be(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named) as caught:
        choose("masters", replace(PLAIN, **changes))
    assert "precision='as-is'" in str(caught.value)


def test_as_is_is_as_is() -> None:
    assert choose("as-is", PLAIN).mode == AS_IS
    assert choose("as-is", replace(PLAIN, autocast="float16", owner="FSDP")).mode == AS_IS


def test_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"apply\(precision='float8'\)"):
        rlpatch.apply(precision="float8")
    monkeypatch.setenv("RLPATCH_PRECISION", "half")
    with pytest.raises(UsageError, match="RLPATCH_PRECISION: 'half' is not one of 'auto', 'masters', 'as-is'"):
        rlpatch.apply()
    monkeypatch.setenv("RLPATCH_PRECISION", "as-is")
    with rlpatch.patched() as report:
        states = {outcome.capability: outcome.reason for outcome in report.outcomes}
        assert states["precision"] == states["master_weights"] == "switched off"
    with rlpatch.patched(precision="auto") as report:
        assert report["precision"].reason != "switched off"
