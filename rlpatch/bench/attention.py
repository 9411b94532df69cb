"""Attention of one decode step, kernel by kernel: ``python -m rlpatch.bench.attention [--shape 8b] [--out FILE.json]``.

For several numbers of sequences and lengths of their contexts: microseconds of FlashAttention 3 as vLLM launches it (in up
to 32 pieces, its default for CUDA graphs, and in one), of vLLM's Triton kernel, and of `rlpatch.decoding.attention` with
the plan that it takes (none: FlashAttention stays) and with others; beside them what reading keys and values would take at
``--tb`` TB/s. Each in a CUDA graph, over several KV caches in turn, so that none is in the GPU's own. A plan whose result
differs from FlashAttention's by more than bf16's rounding ends the bench.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from rlpatch.bench.report import own_version, said, write_json
from rlpatch.bench.shapes import SHAPES
from rlpatch.decoding.attention import Plan, attend, multiprocessors, plan
from rlpatch.decoding.clock import timed
from rlpatch.versions import installed

# sequences, mean context, most that one differs from it, longest that is possible
CASES = (
    (8, 192, 60, 320), (16, 192, 60, 320), (32, 192, 60, 320), (64, 192, 60, 320), (128, 192, 60, 320),
    (8, 1088, 200, 2176), (16, 1088, 200, 2176), (24, 1088, 200, 2176), (32, 1088, 200, 2176), (64, 1088, 0, 2176),
    (64, 1088, 200, 2176), (64, 1088, 900, 2176), (128, 1088, 900, 2176), (8, 192, 60, 2176), (32, 192, 60, 2176),
    (64, 192, 60, 4096), (64, 4000, 90, 4096),
)  # fmt: skip
PAGE = 16
_CACHES = 400 << 20  # bytes in turn: several times what an L2 holds
_ROUNDING = 2e-2  # values are normally distributed


def candidates(longest: int, head: int) -> list[Plan]:
    """Plans to compare."""
    found = []
    for tile, stages in ((64, 3), (128, 2), (128, 3)):
        tile = tile * 128 // head
        whole = -(-longest // tile) * tile
        pieces = [piece for piece in (256, 512, 1024, 2048) if tile <= piece < whole <= 10 * piece] + [whole]
        found += [Plan(tile, stages, piece, -(-longest // piece)) for piece in pieces]
    return found


class Case:
    """Queries and pages of one case.

    Attributes:
        bytes: Of the keys and values that one call reads.
    """

    def __init__(self, heads: int, kv_heads: int, head: int, case: tuple[int, int, int, int]) -> None:
        count, context, spread, self.longest = case
        generator = torch.Generator("cuda").manual_seed(0)
        self.lengths = torch.randint(
            context - spread, context + spread + 1, (count,), generator=generator, device="cuda", dtype=torch.int32
        )
        pages = [-(-length // PAGE) for length in self.lengths.tolist()]
        order = torch.randperm(sum(pages) + 1, generator=generator, device="cuda").int()
        self.table = torch.zeros(count, self.longest // PAGE, dtype=torch.int32, device="cuda")
        at = 0
        for row, own in enumerate(pages):
            self.table[row, :own] = order[at : at + own]
            at += own
        self.bytes = int(self.lengths.sum()) * kv_heads * head * 2 * 2
        shape = (sum(pages) + 1, 2, PAGE, kv_heads, head)
        self.caches = [
            torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16).unbind(1)
            for _ in range(max(2, _CACHES // self.bytes + 1))
        ]
        self.query = torch.randn(count, heads, head, generator=generator, device="cuda", dtype=torch.bfloat16)
        self.starts = torch.arange(count + 1, dtype=torch.int32, device="cuda")
        self.out = torch.empty_like(self.query)
        self.scale = head**-0.5

    def flash(self, splits: int) -> Callable[[Any], Any]:
        """FlashAttention 3's call, as ``FlashAttentionImpl.forward`` makes it."""
        backend = importlib.import_module("vllm.v1.attention.backends.flash_attn")
        count, heads, head = self.query.shape
        common = {"max_seqlen_q": 1, "max_seqlen_k": self.longest, "cu_seqlens_q": self.starts, "causal": True}
        schedule = backend.get_scheduler_metadata(
            batch_size=count, num_heads_q=heads, num_heads_kv=self.caches[0][0].shape[2], headdim=head, page_size=PAGE,
            cache_seqlens=self.lengths, qkv_dtype=torch.bfloat16, window_size=(-1, -1), num_splits=splits, **common,
        )  # fmt: skip
        return lambda cache: backend.flash_attn_varlen_func(
            q=self.query, k=cache[0], v=cache[1], out=self.out, seqused_k=self.lengths, softmax_scale=self.scale,
            window_size=[-1, -1], block_table=self.table, softcap=0.0, scheduler_metadata=schedule, fa_version=3,
            num_splits=splits, **common,
        )  # fmt: skip

    def triton(self) -> Callable[[Any], Any]:
        """vLLM's own Triton kernel."""
        module = importlib.import_module("vllm.v1.attention.ops.triton_unified_attention")
        return lambda cache: module.unified_attention(
            q=self.query, k=cache[0], v=cache[1], out=self.out, cu_seqlens_q=self.starts, max_seqlen_q=1,
            seqused_k=self.lengths, max_seqlen_k=self.longest, softmax_scale=self.scale, causal=True, window_size=(-1, -1),
            block_table=self.table, softcap=0, q_descale=None, k_descale=None, v_descale=None,
        )  # fmt: skip

    def ours(self, how: Plan) -> Callable[[Any], Any]:
        """`rlpatch.decoding.attention`'s."""

        def run(cache: Any) -> bool:
            keys, values = cache
            return attend(self.query, keys, values, self.table, self.lengths, self.scale, self.out, how)

        return run


def measure(heads: int, kv_heads: int, head: int, sizes: tuple[int, int, int, int], rate: float) -> dict[str, Any]:
    """One row of the table; microseconds."""
    case = Case(heads, kv_heads, head, sizes)
    row: dict[str, Any] = dict(zip(("sequences", "context", "spread", "longest"), sizes, strict=True))
    row["reading"] = case.bytes / rate * 1e6
    for name, run in (("flash", case.flash(32)), ("flash, one piece", case.flash(1)), ("triton", case.triton())):
        row[name] = timed(run, case.caches) * 1e6
    case.flash(32)(case.caches[0])
    theirs = case.out.clone()
    taken = plan(sizes[0], kv_heads, head, case.longest, multiprocessors(case.query.device))
    plans = []
    for how in dict.fromkeys([*([taken] if taken is not None else []), *candidates(case.longest, head)]):
        plans.append({**asdict(how), "us": timed(case.ours(how), case.caches) * 1e6})
        case.ours(how)(case.caches[0])
        difference = float((case.out - theirs).abs().max())
        if difference > _ROUNDING:
            raise SystemExit(f"{how} differs from FlashAttention by {difference:.3f} with {row}")
    row["ours"] = plans[0]["us"] if taken is not None else None
    row["plans"] = sorted(plans, key=lambda entry: entry["us"])
    return row


def main(argv: list[str] | None = None) -> int:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(prog="python -m rlpatch.bench.attention", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="8b")
    parser.add_argument("--tb", type=float, default=4.3, help="TB/s at which the device reads (default 4.3, an H200's)")
    parser.add_argument("--out", help="write the rows as JSON, after each")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        parser.error("FlashAttention 3 needs a GPU of Hopper's")
    sizes = SHAPES[options.shape]["num_attention_heads"], 8, 128
    result: dict[str, Any] = {
        "command": "python -m rlpatch.bench.attention " + said(argv if argv is not None else sys.argv[1:]),
        "device": torch.cuda.get_device_name(),
        "versions": {"rlpatch": own_version(), **{name: str(installed(name)) for name in ("vllm", "torch", "triton")}},
        "shape": options.shape,
        "rows": [],
    }
    print(
        "sequences x context: reading, FlashAttention 3, in one piece, vLLM's Triton, ours (its plan); the best plan; us"
    )
    for case in CASES:
        row = measure(*sizes, case, options.tb * 1e12)
        result["rows"].append(row)
        best = row["plans"][0]
        ours = f"{row['ours']:.1f}" if row["ours"] is not None else "-"
        print(
            f"{case[0]} x {case[1]} ± {case[2]} of {case[3]}: {row['reading']:.1f}, {row['flash']:.1f}, "
            f"{row['flash, one piece']:.1f}, {row['triton']:.1f}, {ours}; {best['us']:.1f} with tile {best['tile']}, "
            f"{best['stages']} stages, {best['pieces']} x {best['piece']}",
            flush=True,
        )
        if options.out:
            write_json(result, Path(options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
