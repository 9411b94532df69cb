"""Engine start and rollouts under each compile setting: ``python -m rlpatch.bench.compile --shape 8b --out FILE.json``.

Every measurement is a fresh process, the settings in alternating order. A cold start finds the caches of vLLM, Inductor and
Triton empty (a temporary folder), the warm start after it finds what the cold one left there. The phases of a start stand
in ``rlpatch/bench/start.py``; the JSON is written after each process, and an interrupted run (Ctrl-C, SIGTERM) shows what
it has. ``--tokens 0`` measures starts alone.
"""

from __future__ import annotations

import argparse
import math
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rlpatch.bench import shapes
from rlpatch.bench.command import order, split
from rlpatch.bench.processes import BenchError, Runner, checkpoint, device_facts, failure
from rlpatch.bench.report import figure, own_version, render, said, told_environment, write_json
from rlpatch.bench.start import CAPTURE, OTHER, PHASES, START, StartJob, caches_in
from rlpatch.compilation.profiles import PROFILES, SETTINGS, named
from rlpatch.compilation.workers import cores
from rlpatch.errors import UsageError

SCHEMA = 1
LIBRARIES = ("vllm", "torch", "transformers", "peft", "triton")
COLD, WARM = "cold", "warm"
_AT_ONCE = 3  # settings whose processes wait together


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(
        prog="python -m rlpatch.bench.compile",
        description=__doc__,
        epilog="settings: " + "; ".join(f"{name}: {setting.text}" for name, setting in SETTINGS.items()),
    )
    made.add_argument("--shape", choices=shapes.NAMES, help="random weights (default: 0.6b on a GPU, else tiny)")
    made.add_argument("--model", metavar="PATH", help="a checkpoint folder instead of --shape")
    made.add_argument("--models", metavar="DIR", help="where --shape keeps checkpoints")
    made.add_argument(
        "--settings", default=",".join(PROFILES), metavar="A,B+C",
        help="profiles and settings, each measured; A+B measures the two together (default %(default)s)",
    )  # fmt: skip
    made.add_argument("--cold", action="store_true", help="starts with empty caches (default: both)")
    made.add_argument("--warm", action="store_true", help="starts from cache; each needs a cold one before it")
    made.add_argument("--repeat", type=int, default=1, metavar="N", help="turns: A B C, C B A, …")
    made.add_argument("--lora", type=int, default=0, metavar="R", help="LoRA slots of rank R, and an adapter in them")
    made.add_argument("--sequences", default="8,64", metavar="N,M", help="sequences per rollout (default %(default)s)")
    made.add_argument("--tokens", default="256,2048", metavar="N,M", help="completion tokens; 0: no rollouts")
    made.add_argument("--prompt-tokens", type=int, default=64, metavar="N")
    made.add_argument("--max-num-seqs", type=int, metavar="N", help="the engine's (default: the most of --sequences)")
    made.add_argument(
        "--rollouts",
        type=int,
        default=2,
        metavar="N",
        help="of each size, in the warm process if there is one; their median counts",
    )
    made.add_argument("--utilization", type=float, default=0.5, metavar="U", help="gpu_memory_utilization")
    made.add_argument("--kv-gib", type=float, metavar="G", help="KV cache of this size (the CPU's default: 1/16)")
    made.add_argument(
        "--heap",
        type=float,
        default=0,
        metavar="M",
        help="millions of objects that are alive before, as a trainer's are",
    )
    made.add_argument("--out", metavar="FILE.json", help="default bench/results/compile-SHAPE-vllmVERSION-DATE.json")
    made.add_argument("--logs", metavar="DIR", help="keep each process's log there")
    made.add_argument("--timeout", type=float, default=1800, metavar="S", help="per process (default 1800)")
    made.add_argument("--minutes", type=float, metavar="M", help="begin no further process after so long")
    return made


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Options, checked; ends the process with status 2 on a wrong one."""
    made = parser()
    options = made.parse_args(argv)
    options.settings = list(dict.fromkeys(split(options.settings)))
    if not options.settings:
        made.error("--settings: name at least one")
    for name in options.settings:
        try:
            named(name.replace("+", ","), "--settings")
        except UsageError as error:
            made.error(str(error))
    for option in ("sequences", "tokens"):
        try:
            numbers = tuple(int(text) for text in split(getattr(options, option)))
        except ValueError:
            numbers = ()
        if not numbers or min(numbers) < (0 if option == "tokens" else 1):
            made.error(f"--{option} {getattr(options, option)}: whole numbers with commas between")
        setattr(options, option, numbers)
    options.tokens = tuple(number for number in options.tokens if number)
    for option, least in {"repeat": 1, "lora": 0, "prompt_tokens": 1, "rollouts": 1}.items():
        if getattr(options, option) < least:
            made.error(f"--{option.replace('_', '-')}: at least {least}")
    if not 0 <= options.heap <= 1000:
        made.error("--heap: millions of objects, 0 to 1000")
    if options.max_num_seqs is not None and options.max_num_seqs < 1:
        made.error("--max-num-seqs: at least 1")
    if not 0 < options.utilization <= 1:
        made.error("--utilization: between 0 and 1")
    for option in ("kv_gib", "timeout", "minutes"):
        value = getattr(options, option)
        if value is not None and not (value > 0 and math.isfinite(value)):
            made.error(f"--{option.replace('_', '-')}: more than 0")
    if options.model is not None and options.shape is not None:
        made.error("--model and --shape: one of them")
    if options.model is not None and not (Path(options.model) / "config.json").is_file():
        made.error(f"--model {options.model}: no such checkpoint folder (it has no config.json)")
    if not (options.cold or options.warm):
        options.cold = options.warm = True
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; exit status 0 when every process ended well, 1 when one failed, 2 on usage."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parse(arguments)
    before = signal.signal(signal.SIGTERM, _interrupt)  # e.g. from timeout(1): processes of ours must not outlive it
    try:
        with tempfile.TemporaryDirectory(prefix="rlpatch-compile-") as scratch:
            return _bench(options, arguments, Path(scratch))
    except (BenchError, KeyboardInterrupt) as error:
        print(f"rlpatch bench: {error or 'interrupted'}", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _bench(options: argparse.Namespace, argv: Sequence[str], scratch: Path) -> int:
    from rlpatch.versions import installed

    for library in ("torch", "vllm", "transformers", *(["peft"] if options.lora else [])):
        found = installed(library)
        if not found.present:
            raise BenchError(f"{found}; the bench starts real engines and needs it")
    device = device_facts()
    shape = options.shape or (None if options.model else ("0.6b" if device["cuda"] else shapes.TINY))
    model = checkpoint(options, shape, device)
    title = shape or Path(model).resolve().name
    versions = {library: str(installed(library).version) for library in LIBRARIES}
    job = StartJob(
        variant="",
        model=model,
        lora=options.lora,
        prompt_tokens=options.prompt_tokens,
        utilization=options.utilization if device["cuda"] else min(options.utilization, 0.1),
        kv_bytes=int(options.kv_gib * 2**30) if options.kv_gib else (None if device["cuda"] else 2**26),
        sequences=options.sequences,
        lengths=options.tokens,
        max_num_seqs=options.max_num_seqs or max(options.sequences),
        rollouts=options.rollouts,
        heap=int(options.heap * 1e6),
    )
    stem = f"compile-{title}-vllm{versions['vllm']}-{datetime.now(timezone.utc):%Y%m%d-%H%M%S}"
    path = Path(options.out or Path("bench/results", re.sub(r"[^\w.-]+", "-", stem) + ".json"))
    path.parent.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": "python -m rlpatch.bench.compile " + said(argv),
        "versions": {"rlpatch": own_version(), "python": sys.version.split()[0], **versions},
        "environment": told_environment(),
        "device": {**device, "cores": cores()},
        "model": title,
        "job": {k: v for k, v in asdict(job).items() if k not in ("variant", "model", "output", "caches")},
        "settings": {name: {COLD: [], WARM: []} for name in options.settings},
    }
    logs = Path(options.logs) if options.logs else None
    ended = ""
    try:
        with Runner(scratch, logs, options.timeout, "rlpatch.bench.start") as runner:
            ended = _measure(options, document, path, runner, job, scratch)
    except KeyboardInterrupt:
        ended = "interrupted"
    runs = [run for found in document["settings"].values() for state in found.values() for run in state]
    if runs:
        print(table(document))
        print(f"wrote {path}")
    if ended:
        print(f"rlpatch bench: {ended}", file=sys.stderr)
    return 0 if all("result" in run for run in runs) and not ended else 1


def _measure(
    options: argparse.Namespace, document: dict[str, Any], path: Path, runner: Runner, job: StartJob, scratch: Path
) -> str:
    """Fill the `document`, and write it after every process: what was measured outlives whatever comes next.

    Returns:
        Why it ended before all was measured, or an empty string.
    """
    began = time.monotonic()
    turns = order(options.settings, options.repeat)
    states = (COLD, WARM) if options.warm else (COLD,)
    for number, name in enumerate(turns, 1):
        caches = scratch / f"caches-{number}"
        if options.minutes and time.monotonic() - began > 60 * options.minutes:
            return f"{options.minutes:g} minutes are over after {number - 1} of {len(turns)} turns"
        if not runner.waiting:  # several at once, so that none is imported while another is measured
            some = range(number, min(len(turns), number + _AT_ONCE - 1) + 1)
            environments = [caches_in(scratch / f"caches-{one}") for one in some for _ in states]
            runner.prepare(environments, f"importing in {len(environments)} processes")
        for state in states:
            run = runner.run(
                replace(
                    job,
                    variant=name.replace("+", ","),
                    caches=str(caches),
                    rollouts=0 if state != states[-1] else job.rollouts,
                ),
                f"[{number}/{len(turns)}] {name} {state}",
            )
            document["settings"][name][state].append(run)
            write_json(document, path)
            if "result" not in run:
                runner.dismiss()
                break  # a warm start would find half a cache
        shutil.rmtree(caches, ignore_errors=True)
    return ""


def _collector(result: dict[str, Any]) -> float:
    return float(sum(result["collector"]["phases"].values()))


def _late_kernels(result: dict[str, Any]) -> float | None:
    heard = result.get("first_rollout_triton")
    return heard["seconds"] if heard else None


def table(document: dict[str, Any]) -> str:
    """Medians over repeats, a column per setting; of whole starts and first rollouts the least and the most beside them."""
    found = document["settings"]

    def results(name: str, state: str) -> list[dict[str, Any]]:
        return [run["result"] for run in found[name][state] if "result" in run]

    def row(
        label: str, state: str, read: Callable[[dict[str, Any]], float | None], form: str, spread: bool = False
    ) -> list[str] | None:
        cells = []
        for name in found:
            values = [value for result in results(name, state) if (value := read(result)) is not None]
            cell = figure(statistics.median(values) if values else None, form)
            more = f" ({figure(min(values), form)}–{figure(max(values), form)})" if spread and len(values) > 1 else ""
            cells.append(cell + more)
        return None if all(cell == "–" for cell in cells) else [label, *cells]

    rows: list[list[str] | None] = []
    for state in (COLD, WARM):
        rows.append(row(f"{START}, {state}, s", state, lambda r: r["seconds"][START], ".2f", spread=True))
        counts = [len(results(name, state)) for name in found]
        rows.append(["  of so many starts", *map(str, counts)] if any(counts) else None)
        for phase in (*PHASES, OTHER):
            rows.append(row(f"  {phase}", state, lambda r, phase=phase: r["phases"].get(phase), ".2f"))  # type: ignore[misc]
        rows.append(row("  of all that: collector", state, _collector, ".2f"))
        rows.append(row("    in capture", state, lambda r: r["collector"]["phases"].get(CAPTURE), ".2f"))
        rows.append(row("  first rollout, s", state, lambda r: r["first_rollout_seconds"], ".2f", spread=True))
        rows.append(row("    of it triton", state, _late_kernels, ".2f"))
    states = [state for state in (WARM, COLD) if any(results(name, state) for name in found)]
    state = states[0] if states else COLD
    sizes = [(one["sequences"], one["tokens"]) for name in found for r in results(name, state) for one in r["rollouts"]]
    for sequences, tokens in dict.fromkeys(sizes):

        def rate(result: dict[str, Any], size: tuple[int, int] = (sequences, tokens)) -> float | None:
            return next(
                (o["tokens_per_second"] for o in result["rollouts"] if (o["sequences"], o["tokens"]) == size), None
            )

        rows.append(row(f"tokens/s, {sequences} × {tokens}, {state}", state, rate, ",.0f"))
    first = next((r["greedy"] for name in found for s in (COLD, WARM) for r in results(name, s)), None)
    same = [
        "–" if not (every := [r["greedy"] for s in (COLD, WARM) for r in results(name, s)])
        else f"{sum(one == first for one in every)} of {len(every)}" for name in found
    ]  # fmt: skip
    rows.append([f"same greedy tokens as the first {next(iter(found))}", *same])
    job = document["job"]
    head = (
        f"{document['model']}{', LoRA slots r=' + str(job['lora']) if job['lora'] else ''}, max_num_seqs "
        f"{job['max_num_seqs']}; {document['device']['name']}, {document['device']['cores']} cores; "
        f"vLLM {document['versions']['vllm']}, torch {document['versions']['torch']}"
    )
    lines = [head, render(["", *found], [one for one in rows if one is not None])]
    for name, both in found.items():
        for state, runs in both.items():
            lines += [f"{name}, {state}, failed: {failure(run['error'])}" for run in runs if "error" in run]
        described = next((r["compile"] for s in (COLD, WARM) for r in results(name, s) if r["compile"]), None)
        if described:
            lines += [f"{name}: {setting} left alone: {why}" for setting, why in described["left"].items()]
        heard = next((r["triton"] for r in results(name, COLD) if r.get("triton")), None)
        if heard:
            largest = ", ".join(f"{kernel} {seconds:.2f}" for kernel, seconds in heard["largest"].items())
            lines.append(
                f"{name}, {COLD}: Triton compiled {heard['compiled']} kernels in {heard['seconds']:.2f} s: {largest}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
