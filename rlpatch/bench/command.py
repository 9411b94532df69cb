"""``python -m rlpatch bench``: plain TRL, TRL's sleep mode and rlpatch on the same checkpoint, prompts and seed.

Each variant runs in a fresh process, in alternating order. Written: one JSON document with every step's figures and one
plot of memory over time. What the phases mean stands in ``rlpatch/bench/run.py``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rlpatch.bench import shapes
from rlpatch.bench.run import PHASES, TOO_LONG, VARIANTS, BenchJob, is_out_of_memory, variant_of

SCHEMA = 1
LOG_LINES = 60
_RESIDENT = {
    "trainer": "trainer's weights", "engine": "engine's weights", "both": "weights of both, once each",
    "masters": "fp32 masters", "optimizer_state": "optimizer state",
}  # fmt: skip
LIBRARIES = ("vllm", "trl", "torch", "transformers", "accelerate", "peft", "triton")


class BenchError(Exception):
    """The bench cannot go on; the message says why."""


# ---- the command line ------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(prog="python -m rlpatch bench", description=__doc__)
    what = made.add_argument_group("what is trained")
    what.add_argument("--shape", choices=shapes.NAMES, help="random weights (default: 0.6b on a GPU, else tiny)")
    what.add_argument("--model", metavar="PATH", help="a checkpoint folder instead of --shape")
    what.add_argument(
        "--models", metavar="DIR", help="where --shape keeps checkpoints (default ~/.cache/rlpatch/models)"
    )
    what.add_argument("--variants", metavar="A,B", help="; ".join(
        f"{name}: {one.text}" for name, one in VARIANTS.items()
    ) + "; settings of rlpatch's behind one, as in rlpatch:one_forward=no (default: trl,trl-sleep,rlpatch; with --lora "
    "both ways of rlpatch to bring it)")  # fmt: skip
    what.add_argument(
        "--random-weights", action="store_true",
        help="--shape's config and tokenizer alone are written; the trainer's weights are made in its memory, and plain "
        "TRL's engine finds none (for models larger than the disk)",
    )  # fmt: skip
    what.add_argument(
        "--precision", choices=("object", "script"), default="object",
        help="object: the trainer gets a bf16 model object; script: the path, which TRL loads in fp32",
    )  # fmt: skip
    what.add_argument(
        "--lora", type=int, default=0, metavar="R", help="LoRA of rank R, all linear layers (default: none)"
    )
    what.add_argument("--optim", help="transformers' name of the optimizer (default: its default)")
    what.add_argument("--learning-rate", type=float, default=1e-6)
    what.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=None)
    what.add_argument("--seed", type=int, default=0)

    size = made.add_argument_group("how much")
    size.add_argument("--completions", type=int, default=8, metavar="N", help="per step, all of one prompt (default 8)")
    size.add_argument("--micro-batch", type=int, metavar="N", help="completions per forward pass (default: all)")
    size.add_argument("--prompt-tokens", type=int, default=64, metavar="N")
    size.add_argument("--completion-tokens", type=int, default=256, metavar="N")
    size.add_argument(
        "--rollout-tokens", type=int, metavar="N", help="generate N tokens and repeat them (default: the whole length)"
    )
    size.add_argument(
        "--grow-from", type=int, metavar="N", help="completions grow evenly from N tokens to --completion-tokens"
    )
    size.add_argument("--steps", type=int, default=6, metavar="N")
    size.add_argument(
        "--warmup", type=int, default=2, metavar="N", help="leading steps left out of medians (default 2)"
    )
    size.add_argument("--repeat", type=int, default=1, metavar="N", help="runs of each variant: A B C, C B A, …")

    size.add_argument("--check-base", action="store_true", help="count frozen weights that training changed")
    engine = made.add_argument_group("engine and device")
    engine.add_argument("--kv-gib", type=float, metavar="G", help="KV cache of this size in every variant")
    engine.add_argument("--utilization", type=float, metavar="U", help="gpu_memory_utilization (default 0.5)")
    engine.add_argument(
        "--plan", action="store_true", help="rlpatch's variants leave it alone: their memory plan decides"
    )
    engine.add_argument("--eager", action="store_true", help="no CUDA graphs, no torch.compile")
    engine.add_argument(
        "--no-phase-sync", action="store_true", help="wait for the device at the end of steps only, not of phases"
    )
    engine.add_argument("--emulate-gib", type=float, metavar="G", help="let the GPU look like one of G GiB")

    sweep = made.add_argument_group("longest completion")
    sweep.add_argument("--sweep-context", action="store_true", help="search the longest completion each variant trains")
    sweep.add_argument("--sweep-step", type=int, default=512, metavar="N", help="granularity in tokens (default 512)")
    sweep.add_argument("--sweep-start", metavar="N,M", help="guess, for all variants or one for each (default: none)")
    sweep.add_argument("--sweep-max", type=int, default=131072, metavar="N", help="tokens (default 131072)")
    sweep.add_argument("--sweep-seconds", type=float, default=1800, metavar="S", help="per variant (default 1800)")
    sweep.add_argument(
        "--sweep-utilization",
        default="0.3,0.5,0.7,0.9",
        metavar="U,V",
        help="tried for TRL while rlpatch plans; with colons between lists one for each variant of TRL, or of all",
    )

    sweep.add_argument(
        "--resume", action="store_true", help="go on with the sweep that OUT/NAME.json has begun, on the same versions"
    )

    output = made.add_argument_group("output")
    output.add_argument("--out", default="bench/results", metavar="DIR")
    output.add_argument("--name", help="of the files (default SHAPE-vllmVERSION-DATE)")
    output.add_argument("--logs", metavar="DIR", help="keep each process's log there")
    output.add_argument("--timeout", type=float, default=1800, metavar="S", help="per process (default 1800)")
    return made


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Options, checked; ends the process with status 2 on a wrong one."""
    made = parser()
    options = made.parse_args(argv)

    def refuse(option: str, why: str) -> None:
        made.error(f"--{option} {getattr(options, option.replace('-', '_'))}: {why}")

    usual = ("trl", "trl-sleep", *(name for name, v in VARIANTS.items() if v.lora)) if options.lora else (
        name for name, v in VARIANTS.items() if not v.lora
    )  # fmt: skip
    options.variants = split(options.variants) if options.variants is not None else list(usual)
    if not options.variants:
        made.error(f"--variants: none; known are {', '.join(VARIANTS)}")
    try:
        without = [name for name in options.variants if variant_of(name).lora and not options.lora]
    except ValueError as error:
        made.error(f"--variants: {error}")
    if without:
        made.error(f"--variants {without[0]}: only with --lora R")
    if len(set(options.variants)) < len(options.variants):
        made.error("--variants: each once; --repeat runs them again")
    for option, least in {
        "completions": 2, "prompt-tokens": 1, "completion-tokens": 1, "steps": 1, "warmup": 0, "repeat": 1, "lora": 0,
        "sweep-step": 1, "sweep-max": 1, "rollout-tokens": 1, "grow-from": 1,
    }.items():  # fmt: skip
        value = getattr(options, option.replace("-", "_"))
        if value is not None and value < least:
            refuse(option, f"at least {least}")
    for option in ("kv-gib", "emulate-gib", "sweep-seconds", "timeout", "learning-rate"):
        value = getattr(options, option.replace("-", "_"))
        if value is not None and not (value > 0 and math.isfinite(value)):
            refuse(option, "more than 0")
    if options.warmup >= options.steps:
        refuse("warmup", f"leaves none of {options.steps} steps to measure")
    options.micro_batch = options.completions if options.micro_batch is None else options.micro_batch
    if options.micro_batch < 1 or options.completions % options.micro_batch:
        refuse("micro-batch", f"does not divide --completions {options.completions}")
    if options.utilization is not None and not 0 < options.utilization <= 1:
        refuse("utilization", "between 0 and 1")
    if options.plan and (options.kv_gib or options.sweep_context):
        made.error("--plan: without --kv-gib; a sweep plans anyway")
    if options.resume and not (options.sweep_context and options.name):
        made.error("--resume: with --sweep-context and --name")
    if options.sweep_max < options.sweep_step:
        refuse("sweep-max", f"less than --sweep-step {options.sweep_step}")
    try:
        starts = [int(text) for text in split(options.sweep_start or "0")]
    except ValueError:
        refuse("sweep-start", "numbers with commas between")
    if options.sweep_start and not all(options.sweep_step <= start <= options.sweep_max for start in starts):
        refuse("sweep-start", "between --sweep-step and --sweep-max")
    if len(starts) not in (1, len(options.variants)):
        refuse("sweep-start", f"one number, or one for each of {', '.join(options.variants)}")
    options.sweep_start = starts * (1 if len(starts) > 1 else len(options.variants))
    if options.grow_from is not None and options.grow_from > options.completion_tokens:
        refuse("grow-from", f"more than --completion-tokens {options.completion_tokens}")
    try:
        tried = [[float(text) for text in split(part)] for part in options.sweep_utilization.split(":")]
    except ValueError:
        refuse("sweep-utilization", "numbers with commas between")
    if not all(part and all(0 < u <= 1 for u in part) for part in tried):
        made.error("--sweep-utilization: numbers between 0 and 1")
    plain = [name for name in options.variants if variant_of(name).apply is None]
    for names in (plain, options.variants):
        if len(tried) in (1, len(names)):
            tried = tried * len(names) if len(tried) == 1 else tried
            options.sweep_utilization = dict(zip(names, tried, strict=True))
            break
    else:
        refuse("sweep-utilization", f"one list, or with colons between one for each of {', '.join(plain)}")
    if options.model is not None:
        if options.shape is not None:
            made.error("--model and --shape: one of them")
        if not (Path(options.model) / "config.json").is_file():
            refuse("model", "no such checkpoint folder (it has no config.json)")
    if options.random_weights and (options.model is not None or options.precision != "object"):
        made.error("--random-weights: with --shape and --precision object")
    if options.name is not None and (Path(options.name).name != options.name or options.name in ("", ".", "..")):
        refuse("name", "a file name without folders")
    return options


def split(text: str) -> list[str]:
    """``"a, b"`` → ``["a", "b"]``."""
    return [part.strip() for part in text.split(",") if part.strip()]


def main(argv: list[str]) -> int:
    """Run the bench; exit status 0 when every variant ran (or does not exist here), 1 when one failed, 2 on usage."""
    options = parse(argv)
    try:
        with tempfile.TemporaryDirectory(prefix="rlpatch-bench-") as scratch:
            return _bench(options, argv, Path(scratch))
    except BenchError as error:
        print(f"rlpatch bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("rlpatch bench: interrupted", file=sys.stderr)
        return 1


def _bench(options: argparse.Namespace, argv: Sequence[str], scratch: Path) -> int:
    from rlpatch.versions import installed

    for library in ("torch", "vllm", "trl", "transformers", "datasets", *(["peft"] if options.lora else [])):
        found = installed(library)
        if not found.present:
            raise BenchError(f"{found}; the bench trains for real and needs it")
    device = _device()
    if options.emulate_gib is not None and not device["cuda"]:
        raise BenchError("--emulate-gib needs a GPU")
    shape = options.shape or (None if options.model else ("0.6b" if device["cuda"] else shapes.TINY))
    model = _checkpoint(options, shape, device, options.random_weights)
    job = job_from(options, model)
    versions = {library: str(installed(library).version) for library in LIBRARIES}
    title = shape or Path(model).resolve().name
    name = options.name or re.sub(
        r"[^\w.-]+", "-", f"{title}-vllm{versions['vllm']}-{datetime.now(timezone.utc):%Y%m%d-%H%M%S}"
    )
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "name": name,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": "python -m rlpatch bench " + said(argv),
        "versions": {"rlpatch": _own_version(), "python": sys.version.split()[0], **versions},
        "device": {**device, "emulated_gib": options.emulate_gib},
        "environment": _told_environment(),
        "model": title,
        "job": {k: v for k, v in asdict(job).items() if k not in ("variant", "model", "output")},
        "variants": {},
    }
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    runner = Runner(scratch, Path(options.logs) if options.logs else None, options.timeout)
    before = _begun(document, options, path) if options.resume else {}
    with ballast(options.emulate_gib) as held:
        if held:
            document["device"]["ballast"] = held
        if options.sweep_context:
            failed = _sweep(options, job, runner, document, path, before)
        else:
            failed = _compare(options, job, runner, document, path)
    print(f"wrote {path}")
    from rlpatch.bench import plot

    image = path.with_suffix(".png")
    problem = plot.draw(document, image)
    print(f"no plot: {problem}" if problem else f"wrote {image}")
    return 1 if failed else 0


def job_from(options: argparse.Namespace, model: str) -> BenchJob:
    """The job that all variants share."""
    utilization = options.utilization
    if utilization is None:
        # with the KV cache's size given, utilization is left a mere check at engine start, which the trainer's
        # own memory can fail
        utilization = 0.05 if options.kv_gib else 0.5
    return BenchJob(
        variant="",
        model=model,
        precision=options.precision,
        steps=options.steps,
        warmup=options.warmup,
        seed=options.seed,
        completions=options.completions,
        micro_batch=options.micro_batch,
        prompt_tokens=options.prompt_tokens,
        completion_tokens=options.completion_tokens,
        step_tokens=_growing(options.grow_from, options.completion_tokens, options.steps)
        if options.grow_from
        else None,
        rollout_tokens=options.rollout_tokens,
        utilization=utilization,
        kv_bytes=int(options.kv_gib * 2**30) if options.kv_gib else None,
        eager=options.eager,
        phase_sync=not options.no_phase_sync,
        lora=options.lora,
        optim=options.optim,
        random_weights=options.random_weights,
        learning_rate=options.learning_rate,
        check_base=options.check_base,
        gradient_checkpointing=options.gradient_checkpointing,
        emulate_gib=options.emulate_gib,
    )


def _growing(first: int, last: int, steps: int) -> list[int]:
    """From `first` to `last` in `steps` even steps."""
    return [last - (last - first) * (steps - 1 - i) // max(1, steps - 1) for i in range(steps)]


def said(argv: Sequence[str]) -> str:
    """The command line for a result, without options that only say where this machine keeps things."""
    places = ("--models", "--out", "--logs")
    kept: list[str] = []
    skip = False
    for word in argv:
        if not skip and word.partition("=")[0] not in places:
            kept.append(word)
        skip = not skip and word in places
    return shlex.join(kept)


def order(variants: Sequence[str], repeat: int) -> list[str]:
    """A B C, C B A, A B C, … so that drift over time favours none."""
    return [name for turn in range(repeat) for name in (variants if turn % 2 == 0 else list(reversed(variants)))]


def _compare(options: argparse.Namespace, job: BenchJob, runner: Runner, document: dict[str, Any], path: Path) -> bool:
    document["variants"] = {name: {"runs": []} for name in options.variants}
    turns = order(options.variants, options.repeat)
    for number, name in enumerate(turns, 1):
        found = document["variants"][name]
        if any("skipped" in run for run in found["runs"]):
            continue
        plans = options.plan and variant_of(name).apply is not None
        one = replace(job, variant=name, utilization=0.0 if plans else job.utilization)
        run = runner.run(one, f"[{number}/{len(turns)}] {name}")
        if "result" in run:  # says the same at greater length
            run = {k: v for k, v in run.items() if k not in ("rows", "engine")}
        found["runs"].append(run)
        found["summary"] = summarize([run["result"] for run in found["runs"] if "result" in run])
        write_json(document, path)  # after every process: what was measured outlives whatever comes next
    print(table(document))
    failed = any("error" in run for found in document["variants"].values() for run in found["runs"])
    return failed or not any("result" in run for found in document["variants"].values() for run in found["runs"])


# ---- the longest completion ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attempt:
    """One length that was tried: `tokens` per completion, and what came of it."""

    tokens: int
    ok: bool
    reason: str = ""
    detail: dict[str, Any] | None = None


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


def _sweep(
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
        found = searches.get(name) or {"best": 0, "utilization": None, "kv": None, "complete": False, "attempts": []}
        if not found["complete"]:
            searches[name] = {**found, "skipped": None}
            _sweep_variant(options, job, runner, name, first, searches[name], lambda: write_json(document, path))
        write_json(document, path)
    print(sweep_table(document))
    return any(not found["best"] and not found["skipped"] for found in document["sweep"]["variants"].values())


def _begun(document: dict[str, Any], options: argparse.Namespace, path: Path) -> dict[str, Any]:
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

    def compared(one: dict[str, Any]) -> dict[str, Any]:
        job = {k: v for k, v in one["job"].items() if k not in ("completion_tokens", "utilization")}  # a sweep's own
        device = {k: v for k, v in one["device"].items() if k != "ballast"}
        return {"model": one["model"], "environment": one["environment"], **one["versions"], **job, **device}

    mine = compared(json.loads(json.dumps(_plain(document)))) | {"step": options.sweep_step, "most": options.sweep_max}
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
    """Search one variant's longest completion, going on with the attempts in `found`, which is kept up to date; `save` is
    called after each process: a search may be interrupted."""
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


def failure(error: dict[str, Any]) -> str:
    """One line: what failed where, e.g. ``out of memory in train``."""
    where = error.get("phase") or error.get("stage") or "start"
    return f"{'out of memory' if error.get('out_of_memory') else error['text'].splitlines()[0][:160]} in {where}"


def sweep_table(document: dict[str, Any]) -> str:
    """Longest completion per variant, as text."""
    found = document["sweep"]["variants"]
    rows = [
        ["longest completion, tokens", *(str(f["best"]) if not f["skipped"] else "skipped" for f in found.values())]
    ]
    rows.append(
        [
            "at utilization",
            *(_number(f["utilization"], "g") if f["utilization"] != 0 else "plan" for f in found.values()),
        ]
    )
    if document["sweep"].get("rollout"):
        rows.append(["tokens generated, then repeated", *(str(document["sweep"]["rollout"]) for _ in found)])
    rows.append(["KV tokens there", *(_number((f["kv"] or {}).get("tokens"), ",d") for f in found.values())])
    rows.append(["trials", *(str(len(f["attempts"])) for f in found.values())])
    rows.append(["search finished", *("yes" if f["complete"] else "no" for f in found.values())])
    lines = [render(["", *found], rows)]
    for name, one in found.items():
        above = sorted((a for a in one["attempts"] if not a["ok"]), key=lambda a: a["tokens"])
        if one["skipped"] or above:
            lines.append(f"{name}: " + (one["skipped"] or f"{above[0]['tokens']} tokens: {above[0]['reason']}"))
    return "\n".join(lines)


# ---- figures ---------------------------------------------------------------------------------------------------------


def summarize(results: list[dict[str, Any]]) -> dict[str, Any] | None:
    """One variant's repeats in one: medians over all measured steps, extremes of memory over all repeats.

    Returns:
        None when no run succeeded.
    """
    if not results:
        return None
    from rlpatch.bench.run import means, medians

    rows = [row for result in results for row in result["steps"][result["job"]["warmup"] :]]
    by_phase: dict[str, dict[str, int]] = {}
    for result in results:
        for phase, found in result["memory"]["by_phase"].items():
            row = by_phase.setdefault(phase, {"max": found["max"], "min": found["min"]})
            row["max"], row["min"] = max(row["max"], found["max"]), min(row["min"], found["min"])
    kv = results[-1]["kv"]

    def middle(values: list[Any]) -> float | None:
        numbers = [value for value in values if value is not None]
        return statistics.median(numbers) if numbers else None

    return {
        "repeats": len(results),
        "measured_steps": len(rows),
        "median": medians(rows, kv.get("bytes")),
        "mean": means(rows),
        "kv": kv,
        "memory": {
            "by_phase": by_phase,
            "peak": max((r["memory"]["peak"] for r in results if r["memory"]["peak"] is not None), default=None),
            "after_release": middle([r["memory"]["after_release"] for r in results]),
            "engine_held": middle([r["memory"]["engine_held"] for r in results]),
            "load_peak_above": middle([(r["memory"]["load"] or {}).get("peak_above") for r in results]),
            "resident": results[-1]["memory"].get("resident"),
            "load_weights": middle([(r["memory"]["load"] or {}).get("weights") for r in results]),
        },
        "base": results[-1].get("base"),
        "engine_start_seconds": [result["seconds"].get("engine_start") for result in results],
        "engine_starts_cold": [bool(result["engine_cache"].get("grew")) for result in results],
    }


def table(document: dict[str, Any]) -> str:
    """The comparison as text, at most 100 columns wide with three variants."""
    found = document["variants"]
    summaries = {name: variant.get("summary") for name, variant in found.items()}

    def cells(read: Callable[[dict[str, Any]], str]) -> list[str]:
        return [_fate(found[name]) if summary is None else read(summary) for name, summary in summaries.items()]

    def seconds(name: str) -> Callable[[dict[str, Any]], str]:
        return lambda s: _number(s["median"].get(name), ".4f" if (s["median"].get(name) or 0) < 0.1 else ".3f")

    def memory(read: Callable[[dict[str, Any]], int | None]) -> Callable[[dict[str, Any]], str]:
        return lambda s: _gib(read(s["memory"]))

    def phase(name: str, extreme: str) -> Callable[[dict[str, Any]], str]:
        return memory(lambda m: (m["by_phase"].get(name) or {}).get(extreme))

    def resident(name: str) -> Callable[[dict[str, Any]], str]:
        return memory(lambda m: (m.get("resident") or {}).get(name))

    def ratio(reference: float) -> Callable[[dict[str, Any]], str]:
        return lambda s: _ratio(s["median"].get("step"), reference)

    labels = {"rollout": "rollout, other"}
    rows = [[f"{labels.get(name, name)}, s", *cells(seconds(name))] for name in PHASES]
    rows.append(["step, s", *cells(seconds("step"))])
    for base in ("trl", "trl-sleep"):
        reference = ((summaries.get(base) or {}).get("median") or {}).get("step")
        if reference and len(found) > 1:
            rows.append([f"step, × {base}", *cells(ratio(reference))])
    rows += [
        ["rollout tokens/s", *cells(lambda s: _number(s["median"].get("tokens_per_second"), ",.0f"))],
        ["the same, all steps together", *cells(lambda s: _number(s["mean"]["tokens_per_second"], ",.0f"))],
        ["garbage collection, s a step", *cells(lambda s: _number(s["mean"]["collector"], ".4f"))],
        ["… while generating", *cells(lambda s: _number(s["mean"]["collector_generating"], ".4f"))],
        ["logp difference", *cells(lambda s: _number(s["median"].get("logp_difference"), ".3g"))],
        *([["frozen base changed, elements", *cells(_drift)]] if document["job"].get("check_base") else []),
        ["memory: generating, max", *cells(phase("generate", "max"))],
        ["memory: training, max", *cells(phase("train", "max"))],
        ["memory: syncing, max", *cells(phase("sync", "max"))],
        ["memory: after release", *cells(memory(lambda m: m["after_release"]))],
        ["memory: engine holds outside rollouts", *cells(memory(lambda m: m["engine_held"]))],
        ["memory: peak of loading, above before", *cells(memory(lambda m: m["load_peak_above"]))],
        *([f"generating: {label}", *cells(resident(key))] for key, label in _RESIDENT.items()),
        ["KV cache", *cells(lambda s: _gib(s["kv"].get("bytes")))],
        ["KV blocks × tokens", *cells(lambda s: f"{s['kv'].get('blocks')} × {s['kv'].get('block_size')}")],
        ["release, ms per GiB of KV", *cells(lambda s: _number(s["median"].get("release_ms_per_gib"), ".2f"))],
        ["restore, ms per GiB of KV", *cells(lambda s: _number(s["median"].get("restore_ms_per_gib"), ".2f"))],
        ["engine start, s", *cells(_starts)],
    ]
    job, device = document["job"], document["device"]
    measured = max((s["measured_steps"] for s in summaries.values() if s), default=0)
    method = f"LoRA r={job['lora']}" if job["lora"] else "full fine-tuning"
    emulated = f", emulating {device['emulated_gib']:g} GiB" if device["emulated_gib"] else ""
    head = [
        f"{document['model']}, {method}, precision {job['precision']}; {device['name']}{emulated}",
        f"{job['completions']} × {job['completion_tokens']} tokens a step; medians of {measured} steps; "
        f"vLLM {document['versions']['vllm']}, TRL {document['versions']['trl']}",
    ]
    lines = [*head, *([render(["", *found], rows)] if any(summaries.values()) else [])]
    for name, variant in found.items():
        for run in variant["runs"]:
            if "skipped" in run:
                lines.append(f"{name} skipped: {run['skipped']}")
            elif "error" in run:
                lines += [
                    f"{name} failed: {failure(run['error'])}",
                    *(f"    {line[:160]}" for line in run["log"][-12:]),
                ]
    return "\n".join(lines)


def _fate(variant: dict[str, Any]) -> str:
    return "skipped" if any("skipped" in run for run in variant["runs"]) else "failed"


def _drift(summary: dict[str, Any]) -> str:
    base = summary.get("base")
    return (
        "–"
        if base is None
        else f"{base['changed']:,} of {base['elements']:,} ({100 * base['changed'] / base['elements']:.3g} %)"
    )


def _starts(summary: dict[str, Any]) -> str:
    """The median of starts from cache, and of cold ones (vLLM's compile cache grew)."""
    both = zip(summary["engine_start_seconds"], summary["engine_starts_cold"], strict=True)
    pairs = [(seconds, cold) for seconds, cold in both if seconds is not None]
    groups = [("", [s for s, cold in pairs if not cold]), (" cold", [s for s, cold in pairs if cold])]
    return "; ".join(f"{statistics.median(seconds):.1f}{word}" for word, seconds in groups if seconds) or "–"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _ratio(value: float | None, reference: float) -> str:
    return "–" if value is None else f"{value / reference:.3f}"


def _gib(count: float | None) -> str:
    if count is None:
        return "–"
    return f"{count / 2**30:.2f} GiB" if abs(count) >= 2**30 else f"{count / 2**20:.1f} MiB"


def render(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain text: the first column left, the others right."""
    columns = [[heading[i], *(row[i] for row in rows)] for i in range(len(heading))]
    widths = [max(len(cell) for cell in column) for column in columns]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join([first, *rest]).rstrip()

    return "\n".join([line(heading), "  ".join("─" * width for width in widths), *(line(row) for row in rows)])


def write_json(document: dict[str, Any], path: Path) -> None:
    """Write `document`, replacing numbers that JSON has no word for by null; whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(_plain(document), indent=1, allow_nan=False) + "\n")
    partial.replace(path)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value


# ---- processes -------------------------------------------------------------------------------------------------------


class Runner:
    """Runs jobs in fresh processes, one at a time.

    Args:
        scratch: Folder for logs and trainers' output.
        logs: Folder in which logs are kept, or None.
        timeout: Seconds until a process is killed.
    """

    def __init__(self, scratch: Path, logs: Path | None, timeout: float) -> None:
        self.scratch, self.timeout = scratch, timeout
        self.logs = logs or scratch
        self.logs.mkdir(parents=True, exist_ok=True)
        self.count = 0
        self.module = "rlpatch.bench.run"

    def run(self, job: BenchJob, title: str, timeout: float | None = None) -> dict[str, Any]:
        """``{"result": …}``, ``{"skipped": reason}`` or ``{"error": {text, stage, phase, out_of_memory}, "log": […]}``,
        each with ``seconds``, ``engine`` and ``rows`` (a step's seconds and tokens) as far as it came."""
        self.count += 1
        log = self.logs / f"{self.count:02d}-{job.variant.replace(':', '-')}.log"
        outcome: dict[str, Any] = {}
        stage = "import"
        start = time.monotonic()
        with log.open("w") as errors, Progress(title) as progress:
            process = subprocess.Popen(
                [sys.executable, "-m", self.module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=_environment(),
                start_new_session=True,  # what it starts (compile workers) ends with it
            )
            assert process.stdin is not None and process.stdout is not None
            timer = threading.Timer(timeout or self.timeout, _kill, [process])
            timer.start()
            try:
                process.stdin.write(json.dumps(asdict(replace(job, output=str(self.scratch / f"out-{self.count}")))))
                process.stdin.close()
                for line in process.stdout:
                    message = _message(line)
                    if "stage" in message:
                        stage = message["stage"]
                        progress.say(stage)
                    elif "progress" in message:
                        row = message["progress"]
                        progress.say(f"step {row['step']}/{job.steps}")
                        outcome.setdefault("rows", []).append({k: v for k, v in row.items() if k != "step"})
                    elif "trained" in message and outcome.get("rows"):
                        outcome["rows"][-1]["trained"] = message["trained"]
                    elif "engine" in message:
                        outcome["engine"] = message["engine"]
                    outcome.update({k: v for k, v in message.items() if k in ("result", "skipped", "error")})
                _ended(process)
            except BrokenPipeError:
                _ended(process)
            finally:
                late = not timer.is_alive()
                timer.cancel()
                _end(process)
            if "result" not in outcome and "skipped" not in outcome:
                outcome["log"] = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
                if "error" not in outcome:  # it could not say itself
                    error = _death(process.returncode, late, timeout or self.timeout, stage)
                    error["out_of_memory"] |= is_out_of_memory("\n".join(outcome["log"]))
                    outcome["error"] = error
            progress.end("failed: " + failure(outcome["error"]) if "error" in outcome else
                         "skipped: " + outcome["skipped"] if "skipped" in outcome else "done")  # fmt: skip
        outcome["seconds"] = time.monotonic() - start
        return outcome


def _message(line: str) -> dict[str, Any]:
    if not line.startswith("{"):
        return {}
    try:
        return dict(json.loads(line))
    except ValueError:
        return {}


def _death(status: int, late: bool, timeout: float, stage: str) -> dict[str, Any]:
    if late:
        text = f"no result after {timeout:.0f} s"
    elif status < 0:
        try:
            text = f"killed by {signal.Signals(-status).name}"
        except ValueError:
            text = f"killed by signal {-status}"
    else:
        text = f"the process ended with status {status}"
    # the kernel's way of saying that host memory is full
    return {"text": text, "stage": stage, "phase": None, "out_of_memory": status == -signal.SIGKILL and not late,
            "late": late}  # fmt: skip


def _ended(process: subprocess.Popen[str]) -> None:
    """Wait for the process's end without reaping it, so that its process group's id stays taken."""
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)


def _kill(process: subprocess.Popen[str]) -> None:
    """Kill the process, unless it has been reaped, and all that it started."""
    if process.returncode is None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass


def _end(process: subprocess.Popen[str]) -> None:
    """Kill and reap."""
    _kill(process)
    process.wait()


def _environment() -> dict[str, str]:
    from rlpatch.demo.command import _environment, _free_port

    return {**_environment(_free_port()), "PYTHONUNBUFFERED": "1"}


class Progress:
    """A line per process on standard error; rewritten in place on a terminal, else printed again now and then."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.note = "starting"
        self.terminal = sys.stderr.isatty()
        self._stop = threading.Event()
        self._start = time.monotonic()

    def __enter__(self) -> Progress:
        self._print()
        self._thread = threading.Thread(target=self._tick, daemon=True)
        self._thread.start()
        return self

    def say(self, note: str) -> None:
        """What it is doing now."""
        self.note = note

    def _tick(self) -> None:
        while not self._stop.wait(0.5 if self.terminal else 30):
            self._print()

    def _print(self, end: bool = False) -> None:
        line = f"{self.title}: {self.note} ({time.monotonic() - self._start:.0f} s)"
        if self.terminal:
            print(f"\r\x1b[K{line[:160]}", end="\n" if end else "", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def end(self, note: str) -> None:
        """The last word."""
        self.note = note

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._print(end=True)


@contextmanager
def ballast(gib: float | None) -> Iterator[dict[str, Any] | None]:
    """Hold all but `gib` GiB of the device in a process of its own meanwhile; nothing when `gib` is None."""
    if gib is None:
        yield None
        return
    process = subprocess.Popen(
        [sys.executable, "-m", "rlpatch.bench.ballast", str(gib)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=_environment(),
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        answer: dict[str, Any] = {}
        while not answer and (line := process.stdout.readline()):
            answer = _message(line)
        if "free" not in answer:
            raise BenchError(answer.get("error", "the ballast process died"))
        yield answer
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            _end(process)


def _device() -> dict[str, Any]:
    """Name and size of the device, asked in a process of its own so that torch and its context stay out of this one."""
    code = (
        "import json, torch; c = torch.cuda.is_available(); "
        "print(json.dumps({'cuda': c, 'name': torch.cuda.get_device_name() if c else 'CPU', "
        "'total_bytes': torch.cuda.get_device_properties(0).total_memory if c else None, "
        "'cuda_version': torch.version.cuda}))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    found = [message for line in answer.stdout.splitlines() if (message := _message(line))]
    if not found:
        raise BenchError(f"torch does not import: {answer.stderr.strip().splitlines()[-1:]}")
    return found[-1]


def _checkpoint(options: argparse.Namespace, shape: str | None, device: dict[str, Any], bare: bool = False) -> str:
    """The folder of `--model` or of `shape`, made if need be; `bare`: config and tokenizer without weights."""
    if shape is None:
        return str(options.model)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parent = Path(options.models) if options.models else cache / "rlpatch" / "models"
    folder = parent / f"{shape}-{'bf16' if device['cuda'] else 'cpu'}{'-bare' if bare else ''}"
    if not shapes.present(shape, folder):
        with Progress(f"making {shape} in {folder}") as progress:
            command = [sys.executable, "-m", "rlpatch.bench.shapes", shape, str(folder), *(["--bare"] if bare else [])]
            made = subprocess.run(command, capture_output=True, text=True, env=_environment())
            progress.end("failed" if made.returncode else "done")
        if made.returncode:
            raise BenchError(f"{shape} could not be made:\n{made.stderr[-2000:]}")
    return str(folder)


def _told_environment() -> dict[str, str]:
    """Variables that change what is measured, without those that name this machine's folders."""
    prefixes = ("PYTORCH_", "RLPATCH_", "VLLM_", "CUBLAS_", "NVIDIA_TF32")
    return {
        name: value for name, value in sorted(os.environ.items()) if name.startswith(prefixes) and os.sep not in value
    }


def _own_version() -> str:
    import rlpatch

    return rlpatch.__version__
