"""Memory over time, one lane per variant, phases shaded; of a sweep, memory over the completions' length:
``python -m rlpatch.bench.plot RESULT.json [IMAGE]``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

COLORS = {
    "sync": "#d62728",
    "empty cache": "#7f7f7f",
    "put": "#ff7f0e",
    "restore": "#9467bd",
    "generate": "#1f77b4",
    "release": "#e377c2",
    "take out": "#8c564b",
    "rollout": "#aec7e8",
    "train": "#2ca02c",
}


def draw(result: dict[str, Any], path: Path) -> str | None:
    """Draw the last repeat of each variant of a result, or the lengths of a sweep, to `path` (the suffix tells the format).

    Returns:
        None, or why there is no plot.
    """
    lanes: dict[str, Any] = {}
    if "sweep" not in result:
        found = {name: _last_timeline(variant) for name, variant in result["variants"].items()}
        lanes = {name: lane for name, lane in found.items() if lane is not None}
        if not lanes:
            return "no variant has a timeline"
    elif not any(one["attempts"] for one in result["sweep"]["variants"].values()):
        return "no variant has trained a length"
    try:
        import matplotlib
    except ImportError:
        return f"matplotlib is not installed; later: python -m rlpatch.bench.plot {path.with_suffix('.json')}"
    matplotlib.use("Agg")
    if lanes:
        _draw_lanes(result, lanes, path)
    else:
        _draw_sweep(result, path)
    return None


def _draw_lanes(result: dict[str, Any], lanes: dict[str, Any], path: Path) -> None:
    from matplotlib import pyplot
    from matplotlib.patches import Patch as Swatch

    unit, mib = _unit(lanes)
    figure, rows = pyplot.subplots(
        len(lanes), sharex=True, sharey=True, squeeze=False, figsize=(12, 1.2 + 2.2 * len(lanes)), layout="constrained"
    )
    for axes, (name, lane) in zip(rows[:, 0], lanes.items(), strict=True):
        steps = lane["steps"][lane["warmup"] :]
        origin, end = steps[0][0], steps[-1][1]
        axes.axvspan(0, end - origin, color=COLORS["train"], alpha=0.12, linewidth=0)
        for phase, start, stop, depth, step in lane["phases"]:
            if step >= lane["warmup"] and start < end and phase in COLORS:
                span = (start - origin, stop - origin)
                # white below each: an inner phase covers the outer one instead of mixing with it
                axes.axvspan(*span, color="white", linewidth=0, zorder=1 + depth)
                axes.axvspan(*span, color=COLORS[phase], alpha=0.45, linewidth=0, zorder=1.1 + depth)
        for _, moment in steps:
            axes.axvline(moment - origin, color="black", alpha=0.25, linewidth=0.6, zorder=8)
        points = [(s, m) for s, m in zip(lane["seconds"], lane["mib"], strict=True) if origin <= s <= end]
        axes.plot([s - origin for s, _ in points], [m / mib for _, m in points], color="black", linewidth=1, zorder=9)
        axes.set_ylabel(f"{name}\n{unit} used")
        axes.margins(x=0)
    top = max(m for lane in lanes.values() for s, m in zip(lane["seconds"], lane["mib"], strict=True))
    rows[0, 0].set_ylim(0, 1.08 * top / mib)
    rows[-1, 0].set_xlabel("seconds since the first measured step began")
    about = f"{result['name']} · {result['device']['name']}"
    figure.suptitle(about, fontsize=10)
    figure.legend(
        handles=[Swatch(color=color, alpha=0.12 if n == "train" else 0.45, label=n) for n, color in COLORS.items()],
        loc="outside lower center", ncols=len(COLORS), frameon=False, fontsize=8,
    )  # fmt: skip
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw_sweep(result: dict[str, Any], path: Path) -> None:
    """Each variant's longest completion as a bar, beside it the KV cache it had and the first length that failed."""
    from matplotlib import pyplot

    variants = {name: one for name, one in result["sweep"]["variants"].items() if one["attempts"]}
    figure, (bars, peaks) = pyplot.subplots(
        2, figsize=(9, 3.4 + 0.7 * len(variants)), height_ratios=(len(variants), 4), sharex=True, layout="constrained"
    )
    device = result["device"]
    limit = device.get("emulated_gib") or (device.get("total_bytes") or 0) / 2**30
    for place, (name, one) in enumerate(variants.items()):
        color = f"C{place}"
        bars.barh(place, one["best"], color=color, alpha=0.6)
        kv = (one["kv"] or {}).get("bytes")
        at = {None: "", 0: ", planned"}.get(one["utilization"], f", utilization {one['utilization']}")
        text = f"{one['best']:,} tokens" + (f", KV cache {kv / 2**30:.1f} GiB{at}" if kv else "")
        bars.text(0, place, f"  {text}{'' if one['complete'] else ' (search not finished)'}", va="center", fontsize=9)
        tried = at_utilization(one, one["utilization"]) or one["attempts"]
        passed = sorted(
            (a["tokens"], a["detail"]["memory_peak"] / 2**30)
            for a in tried
            if a["ok"] and (a["detail"] or {}).get("memory_peak")
        )
        peaks.plot(*zip(*passed, strict=True) if passed else ((), ()), "o-", color=color, label=name)
        failed = sorted(a["tokens"] for a in tried if not a["ok"])
        peaks.plot(failed, [limit] * len(failed), "x", color=color, markersize=9, clip_on=False)
    bars.set_yticks(range(len(variants)), list(variants))
    bars.invert_yaxis()
    if limit:
        peaks.axhline(limit, color="black", linewidth=0.8, linestyle=":")
    peaks.set_ylim(bottom=0)
    peaks.set_xlim(left=0)
    peaks.set_ylabel("GiB used at the most\n(× failed)")
    peaks.set_xlabel("tokens per completion")
    peaks.legend(fontsize=8, loc="lower right")
    figure.suptitle(f"{result['name']} · {device['name']}", fontsize=10)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def at_utilization(search: dict[str, Any], utilization: float | None) -> list[dict[str, Any]]:
    """Of a variant's search, what was tried at `utilization`."""
    return [attempt for attempt in search["attempts"] if attempt["utilization"] == utilization]


def _unit(lanes: dict[str, Any]) -> tuple[str, float]:
    most = max((max(lane["mib"], default=0.0) for lane in lanes.values()), default=0.0)
    return ("GiB", 1024.0) if most >= 4096 else ("MiB", 1.0)


def _last_timeline(variant: dict[str, Any]) -> dict[str, Any] | None:
    for run in reversed(variant["runs"]):
        timeline = (run.get("result") or {}).get("timeline")
        if timeline and timeline["steps"][timeline["warmup"] :]:
            return dict(timeline)
    return None


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if not 1 <= len(arguments) <= 2 or arguments[0].startswith("-"):
        print("usage: python -m rlpatch.bench.plot RESULT.json [IMAGE]", file=sys.stderr)
        return 2
    source = Path(arguments[0])
    target = Path(arguments[1]) if len(arguments) == 2 else source.with_suffix(".png")
    problem = draw(json.loads(source.read_text()), target)
    print(problem or target)
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main())
