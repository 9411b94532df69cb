"""Divisibility, as arithmetic: batches that hold whole groups of completions.

GRPO and its kin compare the completions of one prompt with each other, so a generation batch has to hold whole groups of
``num_generations``. With W processes, a micro batch of B per device, A accumulation steps and S steps per generation:

- an optimizer step trains on E = W·B·A completions (the effective batch);
- a generation makes G = W·B·S completions, with S = A unless ``steps_per_generation`` or ``generation_batch_size`` (G
  itself) says otherwise;
- G must be a multiple of ``num_generations``, and of W·B;
- an evaluation step sees W·Bₑ completions, a multiple of ``num_generations_eval`` (``num_generations`` when unset).

The distillation configs count differently (`Layout.PARTITION`): per process, B·A = ``generation_batch_size`` prompts ×
``num_generations``.

Source of the rules: ``__post_init__`` of trl/trainer/grpo_config.py and its relatives, 0.18.0 to 1.16.0.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, replace
from enum import Enum
from math import gcd, lcm

TRAIN = "per_device_train_batch_size"
ACCUMULATION = "gradient_accumulation_steps"
STEPS = "steps_per_generation"
GENERATION = "generation_batch_size"
EVALUATION = "per_device_eval_batch_size"
EVAL_GENERATIONS = "num_generations_eval"
FIELDS = (TRAIN, ACCUMULATION, STEPS, GENERATION, EVALUATION, EVAL_GENERATIONS)


class Layout(str, Enum):
    """How a config counts its generation batch."""

    GROUP = "group"
    PARTITION = "partition"


@dataclass(frozen=True)
class Batching:
    """The numbers that have to divide, under TRL's names. All are counts ≥ 1.

    Attributes:
        world_size: Processes that train together.
        per_device_train_batch_size: Completions per forward and backward pass of one process: what a step needs in memory.
        gradient_accumulation_steps: Such passes per optimizer step.
        num_generations: Completions per prompt; never changed here.
        steps_per_generation: Micro batches per generation; None: as many as accumulation steps.
        generation_batch_size: `Layout.GROUP`: completions per generation over all processes. `Layout.PARTITION`: prompts
            per optimizer step of one process. None: follows from the rest.
        per_device_eval_batch_size: Completions per evaluation step of one process; None: no evaluation.
        num_generations_eval: Completions per prompt in evaluation; None: `num_generations`.
        layout: See `Layout`.
        eval_adjustable: Whether this release heeds `num_generations_eval`.
    """

    world_size: int
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    num_generations: int
    steps_per_generation: int | None = None
    generation_batch_size: int | None = None
    per_device_eval_batch_size: int | None = None
    num_generations_eval: int | None = None
    layout: Layout = Layout.GROUP
    eval_adjustable: bool = True

    @property
    def effective(self) -> int:
        """Completions per optimizer step, over all processes."""
        return self.world_size * self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def generated(self) -> int:
        """Completions per generation, over all processes."""
        if self.layout is Layout.PARTITION:
            return self.effective
        if self.generation_batch_size is not None:
            return self.generation_batch_size
        steps = self.gradient_accumulation_steps if self.steps_per_generation is None else self.steps_per_generation
        return self.world_size * self.per_device_train_batch_size * steps

    @property
    def solvable(self) -> bool:
        """Whether these are counts that arithmetic can work on; TRL refuses the others (0, both ways to say G)."""
        required = (
            self.world_size,
            self.per_device_train_batch_size,
            self.gradient_accumulation_steps,
            self.num_generations,
        )
        optional = (
            self.steps_per_generation,
            self.generation_batch_size,
            self.per_device_eval_batch_size,
            self.num_generations_eval,
        )
        counts = [*required, *(value for value in optional if value is not None)]
        return all(isinstance(value, int) and not isinstance(value, bool) and value >= 1 for value in counts) and (
            self.steps_per_generation is None or self.generation_batch_size is None
        )

    def train_problem(self) -> str | None:
        """What does not divide in training, in words; None when everything does."""
        processes, batch, accumulation, n = (
            self.world_size,
            self.per_device_train_batch_size,
            self.gradient_accumulation_steps,
            self.num_generations,
        )
        if self.layout is Layout.PARTITION:
            local = batch * accumulation
            if local % n:
                return f"{batch} × {accumulation} = {local} is no multiple of num_generations={n}"
            if self.generation_batch_size is not None and self.generation_batch_size * n != local:
                return f"generation_batch_size={self.generation_batch_size} × {n} is not {batch} × {accumulation} = {local}"
            return None
        total = self.generated
        if total % (processes * batch):
            return f"generation_batch_size={total} is no multiple of {processes} × {batch} = {processes * batch}"
        if total % n:
            return (
                f"{processes} × {batch} × {total // (processes * batch)} = {total} completions per generation are no "
                f"whole groups of num_generations={n}"
            )
        return None

    def eval_problem(self) -> str | None:
        """What does not divide in evaluation, in words; None when everything does, or there is no evaluation."""
        if self.layout is Layout.PARTITION or self.per_device_eval_batch_size is None:
            return None
        total = self.world_size * self.per_device_eval_batch_size
        if total % self._eval_group:
            return (
                f"{self.world_size} × {self.per_device_eval_batch_size} = {total} completions per evaluation step are no "
                f"whole groups of {self._eval_group}"
            )
        return None

    @property
    def _eval_group(self) -> int:
        own = self.num_generations_eval if self.eval_adjustable else None
        return own or self.num_generations

    def summary(self) -> str:
        """E and G, in one line."""
        return f"{self.effective} completions per optimizer step, {self.generated} per generation"


def difference(before: Batching, after: Batching) -> dict[str, tuple[int | None, int | None]]:
    """Field -> (before, after), for the fields that differ."""
    old, new = asdict(before), asdict(after)
    return {name: (old[name], new[name]) for name in FIELDS if old[name] != new[name]}


def solve(asked: Batching, changeable: Collection[str] = FIELDS) -> Batching | None:
    """The settings nearest to `asked` that divide.

    What divides is returned as it is. The micro batch and the evaluation batch never grow, so no pass needs more memory
    than before. Among the settings that divide, the effective batch nearest to the one asked for wins; among equally near
    ones that with the larger micro batch (so steps per generation and accumulation change first, the micro batch only to
    come nearer); then the nearest generation batch; then the smaller effective batch.

    While neither ``steps_per_generation`` nor ``generation_batch_size`` is set, both counts of steps stay equal: each
    optimizer step then still trains on completions of the policy that it starts from.

    Args:
        asked: The settings as they are; must be `Batching.solvable`.
        changeable: Fields that may change.

    Returns:
        The settings, or None when no change of these fields makes them divide.
    """
    train = _solve_train(asked, changeable)
    return None if train is None else _solve_evaluation(train, changeable)


def _solve_train(asked: Batching, changeable: Collection[str]) -> Batching | None:
    if asked.train_problem() is None:
        return asked

    def cost(found: Batching) -> tuple[int, int, int, int]:
        return (
            abs(found.effective - asked.effective),
            -found.per_device_train_batch_size,
            abs(found.generated - asked.generated),
            found.effective,
        )

    return min(_candidates(asked, changeable), key=cost, default=None)


def _candidates(asked: Batching, changeable: Collection[str]) -> Iterator[Batching]:
    """For each micro batch, the settings that divide and lie nearest to `asked`: all that an optimum can be among."""
    batches = (
        range(1, asked.per_device_train_batch_size + 1) if TRAIN in changeable else [asked.per_device_train_batch_size]
    )
    for batch in batches:
        step = asked.world_size * batch
        with_batch = replace(asked, per_device_train_batch_size=batch)
        if asked.layout is Layout.PARTITION:
            yield from _partitions(with_batch, asked, changeable)
            continue
        unit = asked.num_generations // gcd(asked.num_generations, step)  # micro batches until groups are whole
        if asked.steps_per_generation is None and asked.generation_batch_size is None:
            for steps in _counts(
                ACCUMULATION, asked.gradient_accumulation_steps, asked.effective, step, unit, changeable
            ):
                yield replace(with_batch, gradient_accumulation_steps=steps)
            continue
        for accumulation in _counts(
            ACCUMULATION, asked.gradient_accumulation_steps, asked.effective, step, 1, changeable
        ):
            tied = replace(with_batch, gradient_accumulation_steps=accumulation)
            if asked.steps_per_generation is not None:
                steps = asked.steps_per_generation
                for count in _nearest(steps, 1, unit) if STEPS in changeable else [steps] * (steps % unit == 0):
                    yield replace(tied, steps_per_generation=count)
            elif asked.generation_batch_size is not None:
                size, whole = asked.generation_batch_size, lcm(asked.num_generations, step)
                for count in _nearest(size, 1, whole) if GENERATION in changeable else [size] * (size % whole == 0):
                    yield replace(tied, generation_batch_size=count)


def _partitions(with_batch: Batching, asked: Batching, changeable: Collection[str]) -> Iterator[Batching]:
    batch, n = with_batch.per_device_train_batch_size, asked.num_generations
    local = asked.per_device_train_batch_size * asked.gradient_accumulation_steps
    unit = n // gcd(n, batch)
    for steps in _counts(ACCUMULATION, asked.gradient_accumulation_steps, local, batch, unit, changeable):
        size = batch * steps // n
        if asked.generation_batch_size is None:
            yield replace(with_batch, gradient_accumulation_steps=steps)
        elif size == asked.generation_batch_size or GENERATION in changeable:
            yield replace(with_batch, gradient_accumulation_steps=steps, generation_batch_size=size)
    if asked.generation_batch_size is not None and ACCUMULATION in changeable:
        steps, rest = divmod(asked.generation_batch_size * n, batch)
        if not rest:
            yield replace(with_batch, gradient_accumulation_steps=steps)


def _counts(field: str, value: int, total: int, step: int, unit: int, changeable: Collection[str]) -> list[int]:
    """Multiples of `unit` that bring ``step × count`` nearest to `total`; `value` alone where the field may not change."""
    if field not in changeable:
        return [value] if value % unit == 0 else []
    return _nearest(total, step, unit)


def _nearest(total: int, step: int, unit: int) -> list[int]:
    """The multiples of `unit` (≥ unit) on both sides of ``total / step``."""
    below = total // (step * unit) * unit
    return [count for count in (below, below + unit) if count >= unit]


def _solve_evaluation(asked: Batching, changeable: Collection[str]) -> Batching | None:
    if asked.eval_problem() is None:
        return asked
    batch, group = asked.per_device_eval_batch_size, asked._eval_group
    assert batch is not None
    unit = group // gcd(group, asked.world_size)
    if EVALUATION in changeable and batch >= unit:
        return replace(asked, per_device_eval_batch_size=batch // unit * unit)
    if EVAL_GENERATIONS in changeable and asked.eval_adjustable:
        # No whole group fits: fewer completions per prompt need no more memory, a larger batch would
        total = asked.world_size * batch
        smaller = [count for count in range(2, group) if total % count == 0]
        if smaller:
            return replace(asked, num_generations_eval=smaller[-1])
    return None
