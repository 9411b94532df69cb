"""The batch arithmetic against brute force: nothing valid is touched, no pass grows, and nothing nearer divides."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlpatch.config.batching import FIELDS, GENERATION, Batching, Layout, difference, solve


@st.composite
def batchings(draw: st.DrawFn, largest: int = 200, world: int = 64) -> Batching:
    counts = st.integers(1, largest)
    layout = draw(st.sampled_from(Layout))
    steps = generation = None
    match draw(st.sampled_from(["tied", "steps", "generation"])):
        case "steps" if layout is Layout.GROUP:
            steps = draw(counts)
        case "generation":
            generation = draw(counts)
    return Batching(
        draw(st.integers(1, world)),
        draw(counts),
        draw(counts),
        draw(counts),
        steps,
        generation,
        draw(st.none() | counts),
        draw(st.none() | counts),
        layout,
        draw(st.booleans()),
    )


def refused(b: Batching) -> bool:
    """TRL's rules as TRL writes them (1.16.0), independent of the code under test."""
    w, per_device, n = b.world_size, b.per_device_train_batch_size, b.num_generations
    if b.layout is Layout.PARTITION:
        local = per_device * b.gradient_accumulation_steps
        size = local // n if b.generation_batch_size is None else b.generation_batch_size
        return size < 1 or size * n != local
    if b.generation_batch_size is not None:
        if b.generation_batch_size % (per_device * w) != 0:
            return True
        generated = b.generation_batch_size
    else:
        steps = b.gradient_accumulation_steps if b.steps_per_generation is None else b.steps_per_generation
        generated = per_device * w * steps
    group = (b.num_generations_eval if b.eval_adjustable else None) or n
    evaluation = b.per_device_eval_batch_size
    return generated % n != 0 or (evaluation is not None and evaluation * w % group != 0)


@settings(max_examples=600)
@given(batchings(), st.sets(st.sampled_from(FIELDS)))
def test_what_comes_out_divides_and_needs_no_more_memory(asked: Batching, changeable: set[str]) -> None:
    for fields in (changeable, FIELDS):
        found = solve(asked, fields)
        if found is None:
            assert refused(asked)
            if fields is FIELDS:  # only evaluation can be beyond help: not one group fits into its batch
                assert asked.eval_problem() is not None
            continue
        assert not refused(found)
        assert set(difference(asked, found)) <= set(fields)
        assert found.num_generations == asked.num_generations and found.world_size == asked.world_size
        assert found.per_device_train_batch_size <= asked.per_device_train_batch_size
        assert (found.per_device_eval_batch_size or 0) <= (asked.per_device_eval_batch_size or 0)
        if not refused(asked):
            assert found == asked
        if asked.steps_per_generation is None:
            assert found.steps_per_generation is None  # an optimizer step trains on what it generated
        assert solve(found, fields) == found


@settings(max_examples=300)
@given(batchings())
def test_training_can_always_be_made_to_divide(asked: Batching) -> None:
    assert solve(replace(asked, per_device_eval_batch_size=None)) is not None


@settings(max_examples=150, deadline=None)
@given(batchings(6, 3))
def test_nothing_nearer_divides(asked: Batching) -> None:
    asked = replace(asked, per_device_eval_batch_size=None)
    found = solve(asked)
    assert found is not None
    best = None
    reach = range(1, 40)  # beyond the largest answer in this space
    counts = [None] if asked.steps_per_generation is None else reach
    sizes = [None] if asked.generation_batch_size is None else range(1, 150)
    for batch, steps in product(range(1, asked.per_device_train_batch_size + 1), reach):
        effective = asked.world_size * batch * steps
        if abs(effective - asked.effective) > abs(found.effective - asked.effective):
            continue
        for count, size in product(counts, sizes):
            candidate = replace(
                asked,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=steps,
                steps_per_generation=count,
                generation_batch_size=size,
            )
            if refused(candidate):
                continue
            key = (
                abs(effective - asked.effective),
                -batch,
                abs(candidate.generated - asked.generated),
            )
            best = key if best is None else min(best, key)
    assert best is not None
    if not refused(asked):
        assert found == asked
        return
    assert best == (
        abs(found.effective - asked.effective),
        -found.per_device_train_batch_size,
        abs(found.generated - asked.generated),
    )


@settings(max_examples=200)
@given(st.integers(1, 8), st.integers(1, 40), st.integers(1, 20), st.booleans())
def test_evaluation_takes_the_largest_batch_that_fits(world: int, batch: int, group: int, adjustable: bool) -> None:
    asked = Batching(world, group, 1, group, per_device_eval_batch_size=batch, eval_adjustable=adjustable)
    fitting = [b for b in range(1, batch + 1) if world * b % group == 0]
    found = solve(asked)
    if fitting:
        assert found is not None and found.per_device_eval_batch_size == fitting[-1]
        return
    smaller = [g for g in range(2, group) if world * batch % g == 0]
    if adjustable and smaller:
        assert found is not None and found.num_generations_eval == smaller[-1]
        assert found.per_device_eval_batch_size == batch
    else:
        assert found is None


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (Batching(1, 1, 1, 8), Batching(1, 1, 8, 8)),  # the usual trap
        (Batching(1, 8, 1, 6), Batching(1, 6, 1, 6)),  # 6 is nearer to 8 than 24 is
        (Batching(1, 4, 4, 6), Batching(1, 3, 6, 6)),  # 18 is nearer to 16 than 12 or 24
        (Batching(2, 4, 3, 16), Batching(2, 4, 2, 16)),  # 16 and 32 are equally near to 24: the cheaper one
        (Batching(1, 4, 2, 6, steps_per_generation=2), Batching(1, 4, 2, 6, steps_per_generation=3)),
        (Batching(2, 4, 1, 4, generation_batch_size=20), Batching(2, 4, 1, 4, generation_batch_size=16)),
        (Batching(4, 3, 1, 2, layout=Layout.PARTITION), Batching(4, 2, 1, 2, layout=Layout.PARTITION)),
        (
            Batching(1, 4, 2, 8, per_device_eval_batch_size=6),
            Batching(1, 4, 2, 8, per_device_eval_batch_size=6, num_generations_eval=6),
        ),
        (
            Batching(1, 4, 2, 8, per_device_eval_batch_size=12),
            Batching(1, 4, 2, 8, per_device_eval_batch_size=8),
        ),
    ],
)
def test_examples(asked: Batching, expected: Batching) -> None:
    assert solve(asked) == expected


def test_what_cannot_be_solved_says_why() -> None:
    assert solve(Batching(1, 1, 1, 8), {GENERATION}) is None
    assert "no whole groups of num_generations=8" in (Batching(1, 1, 1, 8).train_problem() or "")
    assert "6 completions per evaluation step" in (Batching(1, 4, 2, 8, None, None, 6).eval_problem() or "")
    assert "is no multiple of 2 × 4 = 8" in (Batching(2, 4, 1, 4, None, 12).train_problem() or "")


@pytest.mark.parametrize("value", [0, -1, 2.0, True, None])
def test_what_is_no_count_is_left_to_trl(value: object) -> None:
    assert not Batching(1, value, 1, 8).solvable  # type: ignore[arg-type]
    assert not Batching(1, 4, 2, value).solvable  # type: ignore[arg-type]
    assert not Batching(1, 4, 2, 8, steps_per_generation=2, generation_batch_size=8).solvable
