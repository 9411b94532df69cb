"""``bench --sweep-context``: the longest completion that each variant trains."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from rlpatch.bench.plot import at_utilization
from rlpatch.bench.processes import BenchError, Runner, failure
from rlpatch.bench.report import figure, plain, render, write_json
from rlpatch.bench.run import TOO_LONG, BenchJob


@dataclass(frozen=True)
class Attempt:
    """One length that was tried: `tokens` per completion, and what came of it."""

    tokens: int
    ok: bool
    reason: str = ""
    detail: dict[str, Any] | None = None


_OWN = ("completion_tokens", "utilization")  # of a job, what a sweep varies
_ROUND = 8  # lengths per process: starting one takes as long as training a few


def longest(
    trial: Callable[[list[int]], list[Attempt]],
    *,
    step: int,
    most: int,
    first: int = 0,
    known: int = 0,
    tried: Sequence[Attempt] = (),
    in_time: Callable[[], bool] = lambda: True,
) -> tuple[int, list[Attempt], bool]:
    """Search the largest multiple of `step` up to `most` that trains, if that gets no easier with length.

    Args:
        trial: Trains ascending lengths one after the other in one process, and says what came of those that it came to;
            the first that fails is the last. Fewer without a failure: there was no time for more.
        first: A guess, tried first, then one step more and so on: a good one costs one process. One that fails is
            followed by the lengths just below it. Without it each length is a quarter above the one before.
        known: A length known to pass (found under other settings); one more step is tried first, so that settings
            which cannot do better cost one trial. 0 for none.
        tried: What an earlier search came to.
        in_time: Asked before each process.

    Returns:
        The best length (`known` when nothing longer passes), what was tried, and whether the search was finished.
    """
    attempts: list[Attempt] = []
    low, limit, high = known // step, most // step, most // step + 1

    def learn(found: Sequence[Attempt]) -> None:
        nonlocal low, high
        attempts.extend(found)
        for attempt in found:
            tokens = attempt.tokens // step
            low = max(low, tokens) if attempt.ok else min(low, tokens - 1)
            high = high if attempt.ok else min(high, tokens)

    learn(tried)
    guess, misses = first // step, 0
    if high <= limit:
        lengths = _between(low, high)
    elif known or not guess:
        lengths = _upwards(low + 1, limit)
    else:
        start = low + 1 if tried else guess
        lengths = list(range(start, min(start + _ROUND, limit + 1)))
    while high - low > 1:
        if not in_time():
            return low * step, attempts, False
        found = trial([x * step for x in lengths])
        learn(found)
        if not found or (
            found[-1].ok and len(found) < len(lengths)
        ):  # the process was ended before it came to the rest
            return low * step, attempts, False
        several = len(lengths) > 1
        if several and found[0].tokens == lengths[-1] * step:  # no engine could be built for so much
            lengths = lengths[: len(lengths) // 2]
        elif high > limit:
            lengths = _upwards(max(low + 1, low * 5 // 4), limit)
        elif several and not found[0].ok and misses < 2:
            misses += 1
            lengths = list(range(max(low + 1, high - 3 * misses), high))
        else:
            lengths = _between(low, high)
    return low * step, attempts, True


def _upwards(start: int, limit: int) -> list[int]:
    """From `start`, a quarter more each time, to three times as much or `limit`."""
    found = [min(start, limit)]
    while found[-1] < limit and found[-1] < 3 * start and len(found) < _ROUND:
        found.append(min(limit, max(found[-1] + 1, found[-1] * 5 // 4)))
    return found


def _between(low: int, high: int) -> list[int]:
    """What lies between, all or evenly spread."""
    stride = -(-(high - low) // (_ROUND + 1))
    return list(range(low + stride, high, stride))


def sweep(
    options: argparse.Namespace,
    job: BenchJob,
    runner: Runner,
    document: dict[str, Any],
    path: Path,
    before: dict[str, Any],
) -> bool:
    """Each variant's search; `before`: what earlier ones came to, by variant."""
    document["sweep"] = {
        "step": options.sweep_step,
        "most": options.sweep_max,
        "seconds": options.sweep_seconds,
        "rollout": options.rollout_tokens,
        "variants": dict(before),
    }
    searches = document["sweep"]["variants"]
    for name, first in zip(options.variants, options.sweep_start, strict=True):
        found = searches.get(name) or {"best": 0, "utilization": None, "kv": None, "attempts": []}
        searches[name] = {**found, "complete": False, "skipped": None}
        _sweep_variant(options, job, runner, name, first, searches[name], lambda: write_json(document, path))
        write_json(document, path)
    print(sweep_table(document))
    return any(not found["best"] and not found["skipped"] for found in document["sweep"]["variants"].values())


def begun(document: dict[str, Any], options: argparse.Namespace, path: Path) -> dict[str, Any]:
    """The variants' searches in the result at `path`, to go on with; {} when there is none.

    Raises:
        BenchError: it is of another job, of other versions or from another device; says which.
    """
    if not path.exists():
        return {}
    try:
        earlier = json.loads(path.read_text())
        searches = dict(earlier["sweep"]["variants"])
    except (ValueError, KeyError, TypeError) as error:
        raise BenchError(f"--resume: {path} holds no sweep ({type(error).__name__}: {error})") from error

    earlier.setdefault("environment", document["environment"])  # not told by the first results
    unsaid = {
        one.name: one.default for one in fields(BenchJob)
    }  # what a result from before a field's time was made with

    def compared(one: dict[str, Any]) -> dict[str, Any]:
        job = {**unsaid, **one["job"]}
        job = {k: v for k, v in job.items() if k not in ("variant", "model", "output", *_OWN)}
        device = {k: v for k, v in one["device"].items() if k != "ballast"}
        return {"model": one["model"], "environment": one["environment"], **one["versions"], **job, **device}

    mine = compared(json.loads(json.dumps(plain(document)))) | {"step": options.sweep_step, "most": options.sweep_max}
    theirs = compared(earlier) | {k: earlier["sweep"][k] for k in ("step", "most")}
    other = [f"{k}: {theirs.get(k)} there, {v} here" for k, v in mine.items() if theirs.get(k) != v]
    if other:
        raise BenchError(f"--resume: {path} is of something else ({'; '.join(other)}); give another --name")
    document["resumed"] = [*earlier.get("resumed", []), {"date": earlier["date"], "command": earlier["command"]}]
    return searches


def _sweep_variant(
    options: argparse.Namespace,
    job: BenchJob,
    runner: Runner,
    name: str,
    first: int,
    found: dict[str, Any],
    save: Callable[[], None],
) -> None:
    """Search one variant's longest completion, going on with the attempts in `found` (none are needed where they settle it
    already), which is kept up to date; `save` is called after each process: a search may be interrupted."""
    deadline = time.monotonic() + options.sweep_seconds
    # 0: left alone, so that the memory plan decides
    chosen = [job.utilization] if job.kv_bytes else options.sweep_utilization.get(name, [0.0])
    known, finished = 0, True
    for utilization in chosen:

        def trial(lengths: list[int], utilization: float = utilization) -> list[Attempt]:
            title = f"{name}: {', '.join(map(str, lengths))} tokens at {utilization:g}"
            all_of_them = [*lengths, lengths[-1]]  # a rollout follows the longest as well
            changes: dict[str, Any] = dict(
                variant=name, completion_tokens=lengths[-1], step_tokens=all_of_them, utilization=utilization,
                steps=len(all_of_them), warmup=0,
            )  # fmt: skip
            run = runner.run(
                replace(job, **changes), title, timeout=max(1.0, min(runner.timeout, deadline - time.monotonic()))
            )
            found["skipped"] = run.get("skipped")
            attempts = attempts_of(lengths, run)
            found["attempts"] += [{"utilization": utilization, **asdict(attempt)} for attempt in attempts]
            save()
            return attempts

        tried = [
            Attempt(**{k: v for k, v in one.items() if k != "utilization"})
            for one in found["attempts"]
            if one["utilization"] == utilization
        ]
        best, attempts, complete = longest(
            trial,
            step=options.sweep_step,
            most=options.sweep_max,
            first=first,
            known=known,
            tried=tried,
            in_time=lambda: time.monotonic() < deadline and found["skipped"] is None,
        )
        finished = finished and complete
        if best > known:
            known = best
            passed = next(a for a in attempts if a.ok and a.tokens == best)
            found.update(best=best, utilization=utilization, kv=(passed.detail or {})["kv"])
        if found["skipped"] is not None:
            break
    found["complete"] = finished


def attempts_of(lengths: list[int], run: dict[str, Any]) -> list[Attempt]:
    """What `Runner.run` says of a process that was to train `lengths` and the last of them once more.

    A rollout that fails speaks against the length before it: what its training left behind is in the way. A process that
    was ended for its time says nothing of the length it was at, nor of a rollout after the one before.
    """
    if "skipped" in run:
        return []
    done, kv = run.get("rows", []), run.get("engine")
    detail = [{"kv": kv, **row} for row in done]
    if "error" not in run:
        return [Attempt(tokens, True, "", row) for tokens, row in zip(lengths, detail, strict=False)]
    error = run["error"]
    if error.get("late"):
        return [Attempt(tokens, True, "", row) for tokens, row in zip(lengths, detail[:-1], strict=False)]
    in_rollout = error.get("stage") == "rollout" or error.get("phase") == "sync"
    started = bool(done) or error.get("stage") in ("rollout", "train", TOO_LONG)
    passed = min(len(done), len(lengths)) - (bool(done) and (in_rollout or len(done) >= len(lengths)))
    failed = lengths[passed] if started else lengths[-1]  # the engine is built for the longest
    return [
        *(Attempt(tokens, True, "", row) for tokens, row in zip(lengths[:passed], detail, strict=False)),
        Attempt(failed, False, failure(error), {"kv": kv, "error": error}),
    ]


def sweep_table(document: dict[str, Any]) -> str:
    """Longest completion per variant, as text."""
    found = document["sweep"]["variants"]
    rows = [
        ["longest completion, tokens", *(str(f["best"]) if not f["skipped"] else "skipped" for f in found.values())]
    ]
    rows.append(
        [
            "at utilization",
            *(figure(f["utilization"], "g") if f["utilization"] != 0 else "plan" for f in found.values()),
        ]
    )
    if document["sweep"].get("rollout"):
        rows.append(["tokens generated, then repeated", *(str(document["sweep"]["rollout"]) for _ in found)])
    rows.append(["KV tokens there", *(figure((f["kv"] or {}).get("tokens"), ",d") for f in found.values())])
    expanding = [(f["kv"] or {}).get("expandable_segments") for f in found.values()]
    if any(expanding):
        rows.append(["expandable segments", *("–" if one is None else "yes" if one else "no" for one in expanding)])
    rows.append(["trials", *(str(len(f["attempts"])) for f in found.values())])
    rows.append(["search finished", *("yes" if f["complete"] else "no" for f in found.values())])
    lines = [render(["", *found], rows)]
    for name, one in found.items():
        if one["skipped"]:
            lines.append(f"{name}: {one['skipped']}")
            continue
        for utilization in dict.fromkeys(a["utilization"] for a in one["attempts"]):
            above = [a for a in at_utilization(one, utilization) if not a["ok"]]
            if above:
                least = min(above, key=lambda a: int(a["tokens"]))
                at = "" if utilization == one["utilization"] else f" at {utilization:g}"
                lines.append(f"{name}: {least['tokens']} tokens{at}: {least['reason']}")
    return "\n".join(lines)
