"""``python -m rlpatch bench``: plain TRL, TRL's sleep mode and rlpatch on the same checkpoint, prompts and seed.

Each variant runs in a fresh process, in alternating order. Written: one JSON document with every step's figures and one
plot of memory over time. What the phases mean stands in ``rlpatch/bench/run.py``.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rlpatch.bench import plot, shapes
from rlpatch.bench.in_turn import CAPABILITIES
from rlpatch.bench.processes import BenchError, Runner, ballast, checkpoint, device_facts
from rlpatch.bench.report import LIBRARIES, own_version, said, summarize, table, told_environment, write_json
from rlpatch.bench.run import VARIANTS, BenchJob, variant_of
from rlpatch.bench.sweep import begun, sweep

SCHEMA = 1

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

    size.add_argument(
        "--profile", action="store_true", help="two steps more: what Python and the device do in them, phase by phase"
    )
    size.add_argument(
        "--in-turn", metavar="CAPABILITY", choices=CAPABILITIES,
        help="rlpatch's variants do without it in every other step, and the two are compared within one process: "
        f"{', '.join(CAPABILITIES)}",
    )  # fmt: skip
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
        metavar="U,V",
        help="tried for TRL while rlpatch plans (default 0.3,0.5,0.7,0.9), or for rlpatch where no variant is TRL; with "
        "colons between lists one for each variant of TRL, or of all",
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
    if options.in_turn and (options.steps - options.warmup < 4 or options.sweep_context):
        refuse("in-turn", f"needs 4 measured steps and no sweep; --steps {options.warmup + 4} or more")
    if options.in_turn and all(variant_of(name).apply is None for name in options.variants):
        refuse("in-turn", "none of the variants is rlpatch's")
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
        given = options.sweep_utilization or "0.3,0.5,0.7,0.9"
        tried = [[float(text) for text in split(part)] for part in given.split(":")]
    except ValueError:
        refuse("sweep-utilization", "numbers with commas between")
    if not all(part and all(0 < u <= 1 for u in part) for part in tried):
        made.error("--sweep-utilization: numbers between 0 and 1")
    plain = [name for name in options.variants if variant_of(name).apply is None]
    for names in (options.variants,) if options.sweep_utilization and not plain else (plain, options.variants):
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
    device = device_facts()
    if options.emulate_gib is not None and not device["cuda"]:
        raise BenchError("--emulate-gib needs a GPU")
    shape = options.shape or (None if options.model else ("0.6b" if device["cuda"] else shapes.TINY))
    model = checkpoint(options, shape, device, options.random_weights)
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
        "versions": {"rlpatch": own_version(), "python": sys.version.split()[0], **versions},
        "device": {**device, "emulated_gib": options.emulate_gib},
        "environment": told_environment(),
        "model": title,
        "job": {k: v for k, v in asdict(job).items() if k not in ("variant", "model", "output")},
        "variants": {},
    }
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    before = begun(document, options, path) if options.resume else {}
    logs = Path(options.logs) if options.logs else None
    with (
        Runner(scratch, logs, options.timeout, ahead=options.sweep_context) as runner,
        ballast(options.emulate_gib) as held,
    ):
        if held:
            document["device"]["ballast"] = held
        if options.sweep_context:
            failed = sweep(options, job, runner, document, path, before)
        else:
            failed = _compare(options, job, runner, document, path)
    print(f"wrote {path}")
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
        profile=options.profile,
        in_turn=options.in_turn,
        gradient_checkpointing=options.gradient_checkpointing,
        emulate_gib=options.emulate_gib,
    )


def _growing(first: int, last: int, steps: int) -> list[int]:
    """From `first` to `last` in `steps` even steps."""
    return [last - (last - first) * (steps - 1 - i) // max(1, steps - 1) for i in range(steps)]


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
