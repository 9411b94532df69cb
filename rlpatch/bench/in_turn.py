"""One capability on and off in turn, step by step in one process: ``bench --in-turn detokenize``.

Two processes that do the same differ by more than many a capability gains: rollouts of 0.6 and 0.9 s were measured for one
job on an H200 whose host had others to serve. Steps of one process differ less, and they cost no further start. On, off,
off, on: what drifts favours neither.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

# They decide at every call; others are settled when a trainer or an engine is built.
CAPABILITIES = ("detokenize", "logprob_kernels", "lora_casts", "one_forward", "saved_activations")


def is_without(step: int) -> bool:
    """Whether the capability is off in that step, counted from 0."""
    return step % 4 in (1, 2)


def compare(capability: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Median and quartiles of seconds and tokens/s with `capability` and without it; None unless both were measured.

    Args:
        rows: Measured steps; ``row["without"]`` names what was off.
    """
    sides = {
        "with": [row for row in rows if not row.get("without")],
        "without": [row for row in rows if row.get("without")],
    }
    if not all(sides.values()):
        return None
    made: dict[str, Any] = {"capability": capability}
    for side, found in sides.items():
        rates = [row["tokens_per_second"] for row in found if row["tokens_per_second"]]
        made[side] = {
            "steps": len(found),
            "seconds": {name: _spread([row["seconds"][name] for row in found]) for name in found[0]["seconds"]},
            "tokens_per_second": _spread(rates) if rates else None,
        }
    return made


def _spread(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": middle, "lower": low, "upper": high}


def lines(name: str, found: dict[str, Any]) -> list[str]:
    """What `compare` found, as text: the phases that take a hundredth of a step or more."""
    with_it, without = found["with"], found["without"]
    told = [f"{name}, {found['capability']} in turn: {with_it['steps']} steps with it, {without['steps']} without; median "
            "(quartiles)"]  # fmt: skip
    least = 0.01 * with_it["seconds"]["step"]["median"]
    pairs = [(f"{phase}, s", ".4f", here, without["seconds"][phase]) for phase, here in with_it["seconds"].items()
             if max(here["median"], without["seconds"][phase]["median"]) >= least]  # fmt: skip
    pairs.append(("rollout tokens/s", ",.0f", with_it["tokens_per_second"], without["tokens_per_second"]))
    for label, form, here, there in pairs:
        if here and there:
            ratio = f"{here['median'] / there['median']:.3f} ×" if there["median"] else "–"
            told.append(f"  {label}: {_told(here, form)} with, {_told(there, form)} without: {ratio}")
    return told


def _told(one: dict[str, float], form: str) -> str:
    return f"{one['median']:{form}} ({one['lower']:{form}}–{one['upper']:{form}})"
