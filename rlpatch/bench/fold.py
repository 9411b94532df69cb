"""The fold against PEFT's merge, weight by weight: ``python -m rlpatch.bench.fold [--shape 8b] [--rank 32] [--out FILE]``.

Every linear layer of a shape with random weights, an adapter on each, scaled so that ``|D|/|W|`` (root mean squares)
takes given values. Per value: milliseconds of fold and unfold (host clock around a synchronized call, median), what the
fold keeps, whether the weights are the same bits afterwards; beside it what PEFT's arithmetic does to a copy of the
weights: ``W += D; W -= D`` with the delta formed in full, its milliseconds and the share of weights changed after 1
and after ``--cycles`` cycles.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rlpatch.bench.report import write_json
from rlpatch.bench.shapes import SHAPES
from rlpatch.lora.fold import ReversibleFold, checksum
from rlpatch.lora.target import Product, Target
from rlpatch.versions import installed

RATIOS = (0.0, 6e-5, 6e-4, 3e-3, 1e-2, 6e-2)


def matrices(shape: str) -> list[tuple[str, int, int]]:
    """Name, rows and columns of each linear layer inside the blocks of `shape`."""
    s = SHAPES[shape]
    hidden, inner, heads = s["hidden_size"], s["intermediate_size"], 128 * s["num_attention_heads"]
    block = {
        "self_attn.q_proj": (heads, hidden),
        "self_attn.k_proj": (1024, hidden),
        "self_attn.v_proj": (1024, hidden),
        "self_attn.o_proj": (hidden, heads),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    layers = range(s["num_hidden_layers"])
    return [(f"model.layers.{i}.{name}.weight", *size) for i in layers for name, size in block.items()]


def make(shape: str, rank: int, dtype: torch.dtype, device: str) -> list[Target]:
    """Targets with weights of standard deviation 0.02 and adapters whose delta has the same: scale 1 is |D|/|W| = 1."""
    torch.manual_seed(0)
    targets = []
    for name, rows, columns in matrices(shape):
        weight = torch.empty(rows, columns, device=device, dtype=dtype).normal_(0, 0.02)
        left = torch.randn(rows, rank, device=device) * 0.02
        right = torch.randn(rank, columns, device=device) * rank**-0.5
        targets.append(Target(name, weight, (Product(left, right, 1.0),)))
    return targets


def scaled(targets: list[Target], ratio: float) -> list[Target]:
    """The same targets with deltas of `ratio` times the weights."""
    return [Target(t.name, t.weight, tuple(Product(p.left, p.right, ratio) for p in t.products)) for t in targets]


def _timed(function: Callable[[], Any], device: str) -> float:
    if device != "cpu":
        torch.accelerator.synchronize()
    start = time.perf_counter()
    function()
    if device != "cpu":
        torch.accelerator.synchronize()
    return 1e3 * (time.perf_counter() - start)


def measure(targets: list[Target], ratio: float, device: str, repeat: int, cycles: int) -> dict[str, Any]:
    """One row of the table; see the module's docstring."""
    mine = scaled(targets, ratio)
    fold = ReversibleFold()
    before = [checksum(t.weight) for t in mine]
    times: dict[str, list[float]] = {"fold": [], "unfold": []}
    report = fold.fold(mine)  # compiles, and learns how much is kept
    fold.unfold()
    for _ in range(repeat):
        times["fold"].append(_timed(lambda: fold.fold(mine), device))
        report = fold.report
        times["unfold"].append(_timed(fold.unfold, device))
    exact = [checksum(t.weight) for t in mine] == before

    def add(sign: int) -> None:
        for target in mine:
            for product in target.products:
                target.weight.add_(product.left @ product.right, alpha=sign * product.scale)

    copies = [t.weight.clone() for t in mine[: 7 * 4]]  # four blocks show the drift
    merge = _timed(lambda: add(1), device)
    unmerge = _timed(lambda: add(-1), device)
    drift = _changed(mine, copies)
    for _ in range(cycles - 1):
        add(1)
        add(-1)
    later = _changed(mine, copies)
    return {
        "ratio": ratio,
        "fold_ms": statistics.median(times["fold"]),
        "unfold_ms": statistics.median(times["unfold"]),
        "kept_share": report.kept / report.elements,
        "kept_bytes": report.kept_bytes,
        "kept_bytes_share": report.kept_bytes / report.weight_bytes,
        "bit_exact": exact,
        "merge_ms": merge,
        "unmerge_ms": unmerge,
        "merge_changed_share_1": drift,
        f"merge_changed_share_{cycles}": later,
    }


def _changed(targets: list[Target], copies: list[torch.Tensor]) -> float:
    different = sum(int((t.weight != c).sum()) for t, c in zip(targets, copies, strict=False))
    return different / sum(c.numel() for c in copies)


def main(argv: list[str] | None = None) -> int:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(prog="python -m rlpatch.bench.fold", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="8b" if torch.cuda.is_available() else "0.6b")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=5, help="timed cycles per ratio (default 5)")
    parser.add_argument("--cycles", type=int, default=50, help="merge cycles for the drift (default 50)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--out", help="write the rows as JSON")
    options = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.no_grad():
        rows = []
        for ratio in RATIOS:
            targets = make(options.shape, options.rank, getattr(torch, options.dtype), device)
            row = measure(targets, ratio, device, options.repeat, options.cycles)
            rows.append(row)
            print(
                f"|D|/|W| {ratio:7.0e}: fold {row['fold_ms']:7.2f} ms, unfold {row['unfold_ms']:7.2f} ms, kept "
                f"{100 * row['kept_share']:7.4f} % of elements, {100 * row['kept_bytes_share']:6.3f} % of bytes, "
                f"{'bit-exact' if row['bit_exact'] else 'NOT EXACT'}; merge {row['merge_ms']:7.1f} + "
                f"{row['unmerge_ms']:7.1f} ms changes {100 * row['merge_changed_share_1']:.4f} %, after "
                f"{options.cycles} cycles {100 * row[f'merge_changed_share_{options.cycles}']:.4f} %",
                flush=True,
            )
            del targets
    result = {
        "shape": options.shape,
        "rank": options.rank,
        "dtype": options.dtype,
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "torch": str(installed("torch")),
        "rows": rows,
    }
    if options.out:
        write_json(result, Path(options.out))
    return 0 if all(row["bit_exact"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
