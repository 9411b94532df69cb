"""What a result says: figures of several runs in one, tables, JSON, and where they come from."""

from __future__ import annotations

import json
import math
import os
import shlex
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rlpatch.bench.in_turn import compare
from rlpatch.bench.in_turn import lines as in_turn_lines
from rlpatch.bench.processes import failure
from rlpatch.bench.run import PHASES

_RESIDENT = {
    "trainer": "trainer's weights", "engine": "engine's weights", "both": "weights of both, once each",
    "masters": "fp32 masters", "optimizer_state": "optimizer state",
}  # fmt: skip
_FUNCTIONS = 20  # of Python, in a decode step
LIBRARIES = ("vllm", "trl", "torch", "transformers", "accelerate", "peft", "triton")

# ---- where it comes from ---------------------------------------------------------------------------------------------


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


def told_environment() -> dict[str, str]:
    """Variables that change what is measured, without those that name this machine's folders."""
    prefixes = ("PYTORCH_", "RLPATCH_", "VLLM_", "CUBLAS_", "NVIDIA_TF32")
    return {
        name: value for name, value in sorted(os.environ.items()) if name.startswith(prefixes) and os.sep not in value
    }


def own_version() -> str:
    """rlpatch's."""
    import rlpatch

    return rlpatch.__version__


# ---- figures ---------------------------------------------------------------------------------------------------------


def summarize(results: list[dict[str, Any]]) -> dict[str, Any] | None:
    """One variant's repeats in one: medians over all measured steps, extremes of memory over all repeats.

    Returns:
        None when no run succeeded.
    """
    if not results:
        return None
    from rlpatch.bench.run import means, medians

    steps = [row for result in results for row in result["steps"][result["job"]["warmup"] :]]
    rows = [row for row in steps if not row.get("without")]
    turns = results[-1]["job"].get("in_turn")
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
        **({"in_turn": compare(turns, steps)} if turns else {}),
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
        return lambda s: figure(s["median"].get(name), ".4f" if (s["median"].get(name) or 0) < 0.1 else ".3f")

    def memory(read: Callable[[dict[str, Any]], int | None]) -> Callable[[dict[str, Any]], str]:
        return lambda s: gib(read(s["memory"]))

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
        ["rollout tokens/s", *cells(lambda s: figure(s["median"].get("tokens_per_second"), ",.0f"))],
        ["the same, all steps together", *cells(lambda s: figure(s["mean"]["tokens_per_second"], ",.0f"))],
        ["garbage collection, s a step", *cells(lambda s: figure(s["mean"]["collector"], ".4f"))],
        ["… while generating", *cells(lambda s: figure(s["mean"]["collector_generating"], ".4f"))],
        ["logp difference", *cells(lambda s: figure(s["median"].get("logp_difference"), ".3g"))],
        *([["frozen base changed, elements", *cells(_drift)]] if document["job"].get("check_base") else []),
        ["memory: generating, max", *cells(phase("generate", "max"))],
        ["memory: training, max", *cells(phase("train", "max"))],
        ["memory: syncing, max", *cells(phase("sync", "max"))],
        ["memory: after release", *cells(memory(lambda m: m["after_release"]))],
        ["memory: engine holds outside rollouts", *cells(memory(lambda m: m["engine_held"]))],
        ["memory: peak of loading, above before", *cells(memory(lambda m: m["load_peak_above"]))],
        *([f"generating: {label}", *cells(resident(key))] for key, label in _RESIDENT.items()),
        ["KV cache", *cells(lambda s: gib(s["kv"].get("bytes")))],
        ["KV blocks × tokens", *cells(lambda s: f"{s['kv'].get('blocks')} × {s['kv'].get('block_size')}")],
        ["release, ms per GiB of KV", *cells(lambda s: figure(s["median"].get("release_ms_per_gib"), ".2f"))],
        ["restore, ms per GiB of KV", *cells(lambda s: figure(s["median"].get("restore_ms_per_gib"), ".2f"))],
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
    for name, summary in summaries.items():
        turns = (summary or {}).get("in_turn")
        lines += in_turn_lines(name, turns) if turns else []
    for name, variant in found.items():
        made = [run["result"]["profile"] for run in variant["runs"] if (run.get("result") or {}).get("profile")]
        lines += profile_lines(name, made[-1]) if made else []
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


def profile_lines(name: str, made: dict[str, Any]) -> list[str]:
    """What the device did in a profiled step (`rlpatch.bench.step_profile`), as text; milliseconds."""
    phases = sorted(made["phases"].items(), key=lambda one: -one[1]["seconds"])
    total: dict[str, float] = {}
    for _, found in phases:
        for kind, seconds in found["kinds"].items():
            total[kind] = total.get(kind, 0.0) + seconds
    kinds = sorted((kind for kind in total if total[kind] > 0.002 * made["seconds"]), key=lambda kind: -total[kind])
    rows = [
        [phase, *(f"{1e3 * value:,.1f}" for value in (
            found["seconds"], found["busy"], *(found["kinds"].get(kind, 0.0) for kind in kinds)
        ))] for phase, found in phases if found["seconds"] > 1e-4
    ]  # fmt: skip
    title = f"{name}, a step of {1e3 * made['seconds']:,.0f} ms, milliseconds:"
    lines = [title, render(["", "all", "device", *kinds], rows)]
    generate = made["phases"].get("generate")
    if generate is None:
        return lines
    each = 1e3 / made["decode_steps"]
    text = f"a decode step: {each * generate['seconds']:.2f} ms, the device at work for {each * generate['busy']:.2f}"
    if made["weights"] and made["read_bandwidth"]:
        least = 1e3 * made["weights"] / made["read_bandwidth"]
        speed = f"{made['read_bandwidth'] / 1e12:.2f} TB/s"
        text += f"; reading {gib(made['weights'])} of weights at {speed} takes {least:.2f}"
    each_kernel = [
        f"  {each * one['seconds']:8.3f} ms, {one['count'] / made['decode_steps']:6.1f} ×  {one['name']}"
        for one in generate["kernels"]
    ]
    return [*lines, text, *each_kernel, *_host_lines(made, each)]


def _host_lines(made: dict[str, Any], each: float) -> list[str]:
    """What Python did in a decode step (`rlpatch.bench.host_profile`); results of earlier releases do not tell."""
    found = made.get("host", {}).get("generate")
    if not found:
        return []
    parts = sorted(found, key=lambda one: -one["called"])

    def rows(which: list[dict[str, Any]], key: str) -> list[str]:
        return [f"  {each * one[key]:8.3f} ms  {one['function'][:100]}" for one in which[:_FUNCTIONS] if one[key] > 0]

    whole = made.get("host_seconds", {}).get("generate")
    text = f" ({each * whole:.2f} ms, in a step that nothing else watches)" if whole else ""
    return [
        f"the host in a decode step{text}, by Python function, with what it calls:", *rows(parts, "called"),
        "by itself, calls into C included:", *rows(found, "own"),
    ]  # fmt: skip


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


def figure(value: float | None, form: str) -> str:
    """A cell: `value` in the format `form`, or a dash."""
    return "–" if value is None else format(value, form)


def _ratio(value: float | None, reference: float) -> str:
    return "–" if value is None else f"{value / reference:.3f}"


def gib(count: float | None) -> str:
    """A cell: bytes as GiB or MiB, or a dash."""
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
    partial.write_text(json.dumps(plain(document), indent=1, allow_nan=False) + "\n")
    partial.replace(path)


def plain(value: Any) -> Any:
    """What JSON has words for: tuples as lists, numbers that are none as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    return value
