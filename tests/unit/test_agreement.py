"""When rollouts and trainer have parted, told from one number per batch."""

from __future__ import annotations

import math
import random

import pytest

from rlpatch.agreement import CEILING, FACTOR, FLOOR, IN_A_ROW, Agreement


def said(values: list[float]) -> list[int]:
    """After which of `values` it spoke up."""
    agreement = Agreement()
    return [i for i, value in enumerate(values) if agreement.add(value)]


@pytest.mark.parametrize("level", [3e-7, 4e-3, 5e-2])
def test_rounding_says_nothing(level: float) -> None:
    """float32, bfloat16 and a coarse engine; a batch's mean moves by a factor of two either way."""
    rng = random.Random(0)
    assert said([level * 2 ** rng.uniform(-0.9, 0.9) for _ in range(2000)]) == []


def test_float32_noise_may_grow_tenfold() -> None:
    assert said([1e-7] * 3 + [1e-6] * 100) == []


@pytest.mark.parametrize("level", [2e-7, 1e-2])
def test_a_policy_left_behind_is_told_once(level: float) -> None:
    """The difference is measured before the first optimizer step, then it stays up (as TRL 1.8's sleep mode has it)."""
    behind = 0.0438 + FACTOR * level
    assert said([level] + [behind] * 50) == [IN_A_ROW]


def test_slow_drift_is_told() -> None:
    values = [1e-2 + 1e-3 * step for step in range(100)]
    (when,) = said(values)
    assert values[when - IN_A_ROW] <= FACTOR * 1e-2 < values[when - IN_A_ROW + 1]


def test_single_spikes_pass() -> None:
    assert said(([1e-2] * 5 + [0.9, 0.8]) * 20) == []


def test_wrong_from_the_start_is_told_whatever_the_level() -> None:
    assert said([CEILING + 0.5] * 10) == [IN_A_ROW - 1]


def test_what_is_not_finite_is_left_out() -> None:
    agreement = Agreement()
    assert not any(agreement.add(value) for value in (math.nan, math.inf))
    assert agreement.describe() is None


def test_describe_tells_level_limit_and_last() -> None:
    agreement = Agreement()
    for value in (2e-2, 1e-2, 3e-2, 5e-2):
        agreement.add(value)
    assert agreement.describe() == {
        "level": 1e-2, "last": 5e-2, "limit": max(FLOOR, FACTOR * 1e-2), "seen": 4, "parted": False,
    }  # fmt: skip
