"""Memory over time, one lane per variant, phases shaded: ``python -m rlpatch.bench.plot RESULT.json [IMAGE]``."""

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
    """Draw the last repeat of each variant of a result to `path` (the suffix tells the format).

    Returns:
        None, or why there is no plot.
    """
    found = {name: _last_timeline(variant) for name, variant in result["variants"].items()}
    lanes = {name: lane for name, lane in found.items() if lane is not None}
    if not lanes:
        return "no variant has a timeline"
    try:
        import matplotlib
    except ImportError:
        return f"matplotlib is not installed; later: python -m rlpatch.bench.plot {path.with_suffix('.json')}"
    matplotlib.use("Agg")
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
    return None


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
