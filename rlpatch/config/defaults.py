"""Defaults that suit one GPU better than TRL's, and how they are fitted to what the user did set.

Only fields that the user left alone are candidates (`rlpatch.config.given`), and no default may cost the user a setting:
where the defaults do not divide together with the settings that were given, they give way first.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from rlpatch.config.batching import (
    ACCUMULATION,
    EVAL_GENERATIONS,
    EVALUATION,
    FIELDS,
    GENERATION,
    STEPS,
    TRAIN,
    Batching,
    Layout,
    difference,
    solve,
)

GENERATIONS = "num_generations"
LEARNING_RATE = "learning_rate"
DIVISIBILITY = "divisibility"
_BATCH = (TRAIN, ACCUMULATION, GENERATIONS)


@dataclass(frozen=True)
class Default:
    """A better default: the field, its value, and why."""

    field: str
    value: Any
    why: str


@dataclass(frozen=True)
class Change:
    """One line of the listing: what a field was, what it became, and why."""

    field: str
    old: Any
    new: Any
    why: str

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        plain = (bool, int, float, str, type(None))
        values = {name: v if isinstance(v, plain) else str(v) for name, v in (("old", self.old), ("new", self.new))}
        return {"field": self.field, **values, "why": self.why}

    def __str__(self) -> str:
        return f"{self.field}: {self.old} → {self.new} ({self.why})"


LORA_LEARNING_RATE = Default(
    LEARNING_RATE, 5e-5, "a LoRA starts at zero and has few weights; TRL's default is meant for full fine-tuning"
)


def table(*, eight_bit: bool) -> tuple[Default, ...]:
    """The defaults, in the order of the listing; `LORA_LEARNING_RATE` follows when the trainer is built.

    Args:
        eight_bit: bitsandbytes works here, so that the optimizer's state can be kept in 8 bits.
    """
    state = (
        Default("optim", "adamw_8bit", "two moments of one byte each per weight instead of four (bitsandbytes)")
        if eight_bit
        else Default("optim", "adamw_torch_fused", "one kernel for all weights, no temporary copies (no bitsandbytes)")
    )
    return (
        Default("vllm_mode", "colocate", "one GPU holds trainer and engine"),
        Default(TRAIN, 4, "half the activations of 8 in each pass"),
        Default(ACCUMULATION, 2, "the effective batch of 8 stays"),
        Default(GENERATIONS, 8, "the group's mean and deviation, hence the advantage, come from 8 samples"),
        state,
        Default(
            "torch_empty_cache_steps", 250, "gives fragments back to the device now and then; rare enough to be free"
        ),
        Default(
            "auto_find_batch_size", False, "halving the batch on out-of-memory breaks the groups; TRL 1.9 refuses it"
        ),
    )


NAMES: tuple[str, ...] = (
    *(entry.field for entry in table(eight_bit=False)),
    LEARNING_RATE,
    DIVISIBILITY,
)
"""What ``apply(defaults={…})`` can name."""


@dataclass(frozen=True)
class Fixed:
    """What became of one config.

    Attributes:
        changes: Fields that changed, in the order of the listing.
        before: The batch arithmetic as asked; None for a config without any.
        after: The same with the changes.
    """

    changes: tuple[Change, ...] = ()
    before: Batching | None = None
    after: Batching | None = None


def fix(
    values: Mapping[str, Any],
    free: Collection[str],
    given: Collection[str] = (),
    *,
    defaults: Collection[Default],
    names: Collection[str] = NAMES,
    world_size: int = 1,
    evaluates: bool = False,
    eval_adjustable: bool = True,
) -> Fixed:
    """Better defaults for the free fields of one config, fitted to the others, and batches that divide.

    Args:
        values: The config's fields.
        free: Fields that were left at their default.
        given: Fields that were set, as far as that is known.
        defaults: See `table`.
        names: Which defaults are wanted, and ``"divisibility"`` (see `NAMES`).
        world_size: Processes that train together.
        evaluates: Whether evaluation steps run (``eval_strategy`` is not ``"no"``).
        eval_adjustable: Whether the release heeds ``num_generations_eval``.
    """
    wanted = {
        entry.field: entry
        for entry in defaults
        if entry.field in names and entry.field in free and entry.field in values and values[entry.field] != entry.value
    }
    if any(name.startswith("vllm_server_") for name in given):
        wanted.pop("vllm_mode", None)  # an engine of its own was asked for
    if not _is_count(values.get(GENERATIONS)) or values[GENERATIONS] < 2:
        wanted.pop(GENERATIONS, None)  # distillation: one completion per prompt is no group of too few

    def batching(chosen: Mapping[str, Default]) -> Batching | None:
        merged = {**values, **{field: entry.value for field, entry in chosen.items()}}
        found = _batching(merged, world_size, evaluates, eval_adjustable)
        return found if found is not None and found.solvable else None

    before = batching({})
    if batching(wanted) is None:
        return Fixed(_changes(values, wanted, {}, {}))
    chosen, after = _fit(wanted, batching, free, DIVISIBILITY in names)
    if after is None:
        return Fixed(_changes(values, chosen, {}, {}), before, batching(chosen))
    start = batching(chosen)
    assert start is not None
    solved = {name: new for name, (_, new) in difference(start, after).items()}
    return Fixed(_changes(values, chosen, solved, _why(start)), before, after)


def _fit(
    wanted: dict[str, Default], batching: Any, free: Collection[str], divide: bool
) -> tuple[dict[str, Default], Batching | None]:
    """The defaults that stay, and the batching they end in (None: it does not divide, and is left to TRL).

    Settings that were given change last: first the free ones are fitted to them, then the defaults give way, the number
    of generations before the batch.
    """
    attempts = [
        wanted,
        {field: entry for field, entry in wanted.items() if field != GENERATIONS},
        {field: entry for field, entry in wanted.items() if field not in _BATCH},
    ]
    own = [name for name in FIELDS if name in free and name not in (STEPS, GENERATION)]
    for chosen in attempts:
        found = solve(batching(chosen), own if divide else ())
        if found is not None:
            return chosen, found
    if not divide:
        return attempts[2], None
    start = batching(attempts[1])
    found = solve(start)
    if found is None:  # no group fits into the evaluation batch; TRL will say so
        training = solve(replace(start, per_device_eval_batch_size=None))
        assert training is not None  # more accumulation always divides
        found = replace(training, per_device_eval_batch_size=start.per_device_eval_batch_size)
    return attempts[1], found


def _batching(values: Mapping[str, Any], world_size: int, evaluates: bool, eval_adjustable: bool) -> Batching | None:
    """The config's numbers, or None for a config whose batches need not hold groups."""
    if GENERATION not in values or GENERATIONS not in values:
        return None
    return Batching(
        world_size,
        values[TRAIN],
        values[ACCUMULATION],
        values[GENERATIONS],
        values.get(STEPS),
        values[GENERATION],
        values[EVALUATION] if evaluates else None,
        values.get(EVAL_GENERATIONS) or None,
        Layout.GROUP if STEPS in values else Layout.PARTITION,
        eval_adjustable and EVAL_GENERATIONS in values,
    )


def _why(start: Batching) -> dict[str, str]:
    """Field -> what does not divide."""
    training, evaluation = start.train_problem() or "", start.eval_problem() or ""
    return {name: evaluation if name in (EVALUATION, EVAL_GENERATIONS) else training for name in FIELDS}


def _changes(
    values: Mapping[str, Any], chosen: Mapping[str, Default], solved: Mapping[str, Any], why: Mapping[str, str]
) -> tuple[Change, ...]:
    changes = [
        Change(field, values[field], entry.value, entry.why) for field, entry in chosen.items() if field not in solved
    ]
    changes += [
        Change(field, values.get(field), new, why[field]) for field, new in solved.items() if values.get(field) != new
    ]
    return tuple(changes)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
