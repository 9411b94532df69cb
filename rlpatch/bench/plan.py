"""The memory plan against what training really holds: ``python -m rlpatch.bench.plan --out FILE.json``.

Every setting is a fresh process that trains a few steps with the plan in force, and counts term by term; what a term means
stands in ``rlpatch/bench/held.py``. The JSON is written after each process.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rlpatch.bench import shapes
from rlpatch.bench.command import split
from rlpatch.bench.held import HeldJob
from rlpatch.bench.processes import BenchError, Runner, ballast, checkpoint, device_facts, failure
from rlpatch.bench.report import LIBRARIES, gib, own_version, render, said, write_json
from rlpatch.compilation.workers import cores

SCHEMA = 1


@dataclass(frozen=True)
class Setting:
    """What is trained how: fields of `HeldJob`."""

    text: str
    lora: int = 0
    optim: str = "adamw_torch_fused"
    beta: float = 0.0
    precision: str = "object"


SETTINGS = {
    "lora": Setting("LoRA r=32 on all linear layers", lora=32),
    "full": Setting("full fine-tuning, fused AdamW"),
    "adam-8bit": Setting("full fine-tuning, bitsandbytes' 8-bit Adam", optim="adamw_8bit"),
    "script-lora": Setting("a plain script, LoRA r=32 (the model given as a path)", lora=32, precision="script"),
    "script-full": Setting("a plain script, full fine-tuning (float32 masters)", precision="script"),
    "reference": Setting("full fine-tuning with a reference model (beta 0.04)", beta=0.04),
}
DEFAULT = {"0.6b": tuple(SETTINGS), "8b": ("lora", "full", "script-lora")}


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(
        prog="python -m rlpatch.bench.plan",
        description=__doc__,
        epilog="settings: " + "; ".join(f"{name}: {setting.text}" for name, setting in SETTINGS.items()),
    )
    made.add_argument(
        "--settings",
        metavar="A,B",
        help="default: all on 0.6b, and lora, full and script-lora on 8b; with --shapes all on each",
    )
    made.add_argument("--shapes", metavar="S,T", help=f"of {', '.join(shapes.NAMES)}, random weights (CPU: tiny)")
    made.add_argument("--models", metavar="DIR", help="where checkpoints are kept (default ~/.cache/rlpatch/models)")
    made.add_argument("--steps", type=int, default=4, metavar="N", help="the first is left out (default 4)")
    made.add_argument("--completions", type=int, default=8, metavar="N", help="per step, all of one prompt (default 8)")
    made.add_argument("--micro-batch", type=int, metavar="N", help="completions per forward pass (default: all)")
    made.add_argument("--prompt-tokens", type=int, default=64, metavar="N")
    made.add_argument("--completion-tokens", type=int, metavar="N", help="default 512 (CPU: 16)")
    made.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=True)
    made.add_argument("--eager", action="store_true", help="no CUDA graphs, no torch.compile")
    made.add_argument("--emulate-gib", type=float, metavar="G", help="let the GPU look like one of G GiB")
    made.add_argument("--out", metavar="FILE.json", help="default bench/results/plan-vllmVERSION-DATE.json")
    made.add_argument("--logs", metavar="DIR", help="keep each process's log there")
    made.add_argument("--timeout", type=float, default=600, metavar="S", help="per process (default 600)")
    return made


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Options, checked; ends the process with status 2 on a wrong one."""
    made = parser()
    options = made.parse_args(argv)
    for option, known in (("settings", SETTINGS), ("shapes", shapes.NAMES)):
        given = getattr(options, option)
        names = None if given is None else list(dict.fromkeys(split(given)))
        if names is not None and (not names or set(names) - set(known)):
            made.error(f"--{option} {given}: known are {', '.join(known)}")
        setattr(options, option, names)
    for option, least in {"steps": 2, "completions": 2, "prompt_tokens": 1}.items():
        if getattr(options, option) < least:
            made.error(f"--{option.replace('_', '-')}: at least {least}")
    if options.completion_tokens is not None and options.completion_tokens < 1:
        made.error("--completion-tokens: at least 1")
    options.micro_batch = options.completions if options.micro_batch is None else options.micro_batch
    if options.micro_batch < 1 or options.completions % options.micro_batch:
        made.error(f"--micro-batch {options.micro_batch}: does not divide --completions {options.completions}")
    for option in ("emulate_gib", "timeout"):
        value = getattr(options, option)
        if value is not None and not (value > 0 and math.isfinite(value)):
            made.error(f"--{option.replace('_', '-')}: more than 0")
    return options


def chosen(options: argparse.Namespace, cuda: bool) -> list[tuple[str, str]]:
    """(shape, setting), in order."""
    if options.shapes is not None:
        return [(shape, name) for shape in options.shapes for name in options.settings or SETTINGS]
    if not cuda:
        return [(shapes.TINY, name) for name in options.settings or SETTINGS]
    if options.settings is not None:
        return [("0.6b", name) for name in options.settings]
    return [(shape, name) for shape, names in DEFAULT.items() for name in names]


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; exit status 0 when every process ended well (or was skipped), 1 when one failed, 2 on usage."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parse(arguments)
    try:
        with tempfile.TemporaryDirectory(prefix="rlpatch-plan-") as scratch:
            return _bench(options, arguments, Path(scratch))
    except (BenchError, KeyboardInterrupt) as error:
        print(f"rlpatch bench: {error or 'interrupted'}", file=sys.stderr)
        return 1


def _bench(options: argparse.Namespace, argv: Sequence[str], scratch: Path) -> int:
    from rlpatch.versions import installed

    for library in ("torch", "vllm", "trl", "transformers", "datasets", "peft"):
        found = installed(library)
        if not found.present:
            raise BenchError(f"{found}; the bench trains for real and needs it")
    device = device_facts()
    if options.emulate_gib is not None and not device["cuda"]:
        raise BenchError("--emulate-gib needs a GPU")
    versions = {library: str(installed(library).version) for library in (*LIBRARIES, "bitsandbytes")}
    job = HeldJob(
        variant="rlpatch",
        model="",
        steps=options.steps,
        warmup=1,
        completions=options.completions,
        micro_batch=options.micro_batch,
        prompt_tokens=options.prompt_tokens if device["cuda"] else min(options.prompt_tokens, 8),
        completion_tokens=options.completion_tokens or (512 if device["cuda"] else 16),
        utilization=0,
        eager=options.eager or not device["cuda"],
        gradient_checkpointing=options.gradient_checkpointing,
        emulate_gib=options.emulate_gib,
        plan_bytes=None if device["cuda"] else 2 << 30,
    )
    stem = f"plan-vllm{versions['vllm']}-{datetime.now(timezone.utc):%Y%m%d-%H%M%S}"
    path = Path(options.out or Path("bench/results", re.sub(r"[^\w.-]+", "-", stem) + ".json"))
    path.parent.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": "python -m rlpatch.bench.plan " + said(argv),
        "versions": {"rlpatch": own_version(), "python": sys.version.split()[0], **versions},
        "device": {**device, "emulated_gib": options.emulate_gib, "cores": cores()},
        "job": {k: v for k, v in asdict(job).items() if k not in ("variant", "model", "output", "setting")},
        "settings": {},
    }
    turns = chosen(options, device["cuda"])
    logs = Path(options.logs) if options.logs else None
    with (
        Runner(scratch, logs, options.timeout, "rlpatch.bench.held", ahead=True) as runner,
        ballast(options.emulate_gib),
    ):
        for number, (shape, name) in enumerate(turns, 1):
            setting = SETTINGS[name]
            model = checkpoint(options, shape, device)
            how = {field: value for field, value in asdict(setting).items() if field != "text"}
            one = replace(job, model=model, setting=name, **how)
            title = f"{shape} {name}"
            run = runner.run(one, f"[{number}/{len(turns)}] {title}")
            document["settings"][title] = {"shape": shape, "setting": name, "text": setting.text, **run}
            write_json(document, path)  # after every process: what was measured outlives whatever comes next
    print(table(document))
    print(f"wrote {path}")
    return 1 if any("error" in found for found in document["settings"].values()) else 0


def table(document: dict[str, Any]) -> str:
    """Every setting's terms, planned and measured, as text."""
    job, device, versions = document["job"], document["device"], document["versions"]
    lines = [
        f"{device['name']}; {job['completions']} completions of {job['completion_tokens']} tokens after prompts of "
        f"{job['prompt_tokens']}, {job['micro_batch']} at once; vLLM {versions['vllm']}, TRL {versions['trl']}, torch "
        f"{versions['torch']}"
    ]
    for title, found in document["settings"].items():
        lines += ["", f"{title}: {found['text']}"]
        if "skipped" in found:
            lines.append(f"skipped: {found['skipped']}")
        elif "error" in found:
            lines.append(f"failed: {failure(found['error'])}")
            lines += [f"    {line[:160]}" for line in found.get("log", [])[-12:]]
        else:
            result = found["result"]
            lines.append(render(["", "planned", "measured", "difference", ""], [_cells(r) for r in result["rows"]]))
            if not result["rows"]:
                lines.append(f"no plan: {result['plan'].get('reason')}")
            lines += [f"not measured: {problem}" for problem in result["problems"]]
    return "\n".join(lines)


def _cells(row: dict[str, Any]) -> list[str]:
    measured, difference = row["measured"], row["difference"]
    if measured is None:
        return [row["name"], gib(row["planned"]), "–", "–", row["why"]]
    verdict = "exact" if not difference else "near" if row["near"] else "OFF"
    if "margin" in row:
        verdict += ", TOO SMALL" if row["too_small"] else f", margin {gib(row['margin'])}"
    share = f" ({100 * difference / measured:+.0f} %)" if measured else ""
    return [row["name"], gib(row["planned"]), gib(measured), gib(difference) + share, verdict]


if __name__ == "__main__":
    sys.exit(main())
