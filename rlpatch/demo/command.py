"""``python -m rlpatch demo``: plain TRL and patched, the same script and seed in fresh processes, one table."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlpatch.demo.worker import METRICS, Job

TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}  # one forward pass less per step rounds otherwise


def main(argv: list[str]) -> int:
    """Run the demo; exit status 0 when both runs agree, 1 when they differ or one fails, 2 on usage errors."""
    parser = argparse.ArgumentParser(prog="python -m rlpatch demo", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="optimizer steps (default 20)")
    parser.add_argument("--model", metavar="PATH", help="a checkpoint folder instead of the tiny model made here")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    if options.steps < 1:
        parser.error(f"--steps {options.steps}: at least 1")
    if options.model is not None and not (Path(options.model) / "config.json").is_file():
        parser.error(f"--model {options.model}: no such checkpoint folder (it has no config.json)")
    with tempfile.TemporaryDirectory(prefix="rlpatch-demo-") as scratch:
        return _demo(options, Path(scratch))


def _demo(options: argparse.Namespace, scratch: Path) -> int:
    from rich.console import Console

    console = Console(stderr=options.json, soft_wrap=False)
    missing = _missing()
    if missing:
        console.print(f"rlpatch demo: {missing}", style="red", highlight=False)
        return 1
    dtype = _dtype()
    model = options.model
    if model is None:
        console.print("making a tiny model …", highlight=False)
        code = f"from rlpatch.demo.tiny import write_model; write_model({str(scratch / 'model')!r}, dtype={dtype!r})"
        made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_environment(0))
        if made.returncode:
            console.print(made.stderr[-2000:], highlight=False, markup=False)
            return 1
        model = str(scratch / "model")
    results = {}
    for patched in (False, True):
        job = Job(model, patched, steps=options.steps, seed=options.seed, dtype=dtype)
        outcome = _run(job, scratch, console)
        if "error" in outcome:
            console.print(f"{_title(patched)} failed: {outcome['error']}", style="red", highlight=False, markup=False)
            console.print(outcome["log"][-3000:], highlight=False, markup=False)
            return 1
        results[_title(patched)] = outcome["result"]
    plain, patched_result = results.values()
    verdict = compare(plain, patched_result, TOLERANCE[dtype])
    if options.json:
        print(json.dumps({"plain": plain, "patched": patched_result, "differences": verdict}))
    else:
        _show(console, plain, patched_result, verdict, dtype)
    return 1 if verdict else 0


def _title(patched: bool) -> str:
    return "patched" if patched else "plain TRL"


def _missing() -> str | None:
    from rlpatch.versions import installed

    for library in ("torch", "vllm", "trl", "transformers", "datasets"):
        found = installed(library)
        if not found.present:
            return f"{found}; the demo trains for real and needs it. `./dev demo` sets up everything"
    return None


def _environment(port: int) -> dict[str, str]:
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "VLLM_NO_USAGE_STATS": "1"}
    return {**quiet, "VLLM_LOGGING_LEVEL": "WARNING", **os.environ, **({"MASTER_PORT": str(port)} if port else {})}


def _dtype() -> str:
    """bfloat16 where a GPU is, float32 on CPU; asked in a process of its own so that torch stays out of this one."""
    code = "import torch; print('bfloat16' if torch.cuda.is_available() else 'float32')"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return answer.stdout.strip() or "float32"


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _run(job: Job, scratch: Path, console: Any) -> dict[str, Any]:
    """Run one job in a fresh process with a progress bar; {"result": …} or {"error": …, "log": …}."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    log = scratch / f"{_title(job.patched).replace(' ', '-')}.log"
    outcome: dict[str, Any] = {}
    columns = (
        TextColumn("{task.description:10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with log.open("w") as errors, Progress(*columns, console=console) as bar:
        task = bar.add_task(_title(job.patched), total=job.steps, note="starting the engine")
        process = subprocess.Popen(
            [sys.executable, "-m", "rlpatch.demo.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=_environment(_free_port()),
        )
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(asdict(job)))
            process.stdin.close()
            for line in process.stdout:
                if not line.startswith("{"):
                    continue
                message = json.loads(line)
                outcome.update({k: v for k, v in message.items() if k != "progress"})
                if "progress" in message:
                    row = message["progress"]
                    note = "" if row["reward"] is None else f"reward {row['reward']:.3f}"
                    bar.update(task, completed=row["step"], note=note)
            process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
    if "result" not in outcome:
        outcome.setdefault("error", f"the process ended with status {process.returncode}")
        outcome["log"] = log.read_text()
    return outcome


def compare(plain: dict[str, Any], patched: dict[str, Any], tolerance: float) -> list[str]:
    """Lines about what differs beyond `tolerance` (absolute), empty when the runs agree."""
    lines = []
    if len(plain["steps"]) != len(patched["steps"]):
        return [f"plain logged {len(plain['steps'])} steps, patched {len(patched['steps'])}"]
    for metric in METRICS:
        worst, where = 0.0, 0
        for step, (a, b) in enumerate(zip(plain["steps"], patched["steps"], strict=True), 1):
            if (a[metric] is None) != (b[metric] is None):
                worst, where = float("inf"), step
            elif a[metric] is not None and not abs(a[metric] - b[metric]) <= worst:
                worst, where = abs(a[metric] - b[metric]), step
        if not worst <= tolerance:
            lines.append(f"{metric} differs by {worst:.3g} at step {where} (tolerance {tolerance:g})")
    return lines


def _show(console: Any, plain: dict[str, Any], patched: dict[str, Any], verdict: list[str], dtype: str) -> None:
    from rich.table import Table

    from rlpatch.versions import installed

    def last(result: dict[str, Any], metric: str) -> str:
        values = [step[metric] for step in result["steps"] if step[metric] is not None]
        return f"{values[0]:.6f} → {values[-1]:.6f}" if values else "–"

    def mib(count: int) -> str:
        return f"{count / 2**20:,.2f} MiB"

    table = Table(title=f"{len(plain['steps'])} steps of GRPO, {dtype}, {installed('vllm')}, {installed('trl')}")
    for heading in ("first → last step", "plain TRL", "patched"):
        table.add_column(heading, justify="left" if heading[0] == "f" else "right")
    rows: list[tuple[str, Any]] = [
        ("loss", lambda r: last(r, "loss")),
        ("reward", lambda r: last(r, "reward")),
        ("grad norm", lambda r: last(r, "grad_norm")),
        ("rollout-vs-trainer logp difference", lambda r: f"{_mean(r, 'logp_difference'):.2e}"),
        ("weight sync, per step", lambda r: f"{1e3 * r['seconds']['sync'] / max(1, r['syncs']):.2f} ms"),
        ("weights resident twice", lambda r: mib(r["weights_twice_bytes"])),
        ("KV cache resident while training", lambda r: mib(r["kv_training_bytes"])),
        ("RSS while training", lambda r: mib(r["training_rss_bytes"])),
        ("peak RSS", lambda r: mib(r["peak_rss_bytes"])),
    ]
    if plain["peak_device_bytes"]:
        rows.append(("peak device memory", lambda r: mib(r["peak_device_bytes"])))
    for name, cell in rows:
        table.add_row(name, cell(plain), cell(patched))
    console.print(table)
    for line in verdict:
        console.print(line, style="red", highlight=False)
    if not verdict:
        console.print("The two runs agree.", style="green", highlight=False)


def _mean(result: dict[str, Any], metric: str) -> float:
    values = [step[metric] for step in result["steps"] if step[metric] is not None]
    return sum(values) / max(1, len(values))
