"""What precision does to numbers and to learning.

``python -m rlpatch.bench.precision [--steps 200] [--seeds 3] [--out FILE]``

Forward and backward of one batch under bf16 autocast, per model family, against float32 weights (what plain TRL trains
when it is given a path): largest difference of the log-probs, and of the gradient (norm of the difference over the norm),
for rlpatch's bfloat16 weights, whose residual stream stays float32, and for bfloat16 weights as they are.

Then GRPO on a task that any model can learn (prefer even tokens), at a learning rate whose steps are far below the spacing
of bfloat16: plain TRL with a path, rlpatch with the same path (masters), and rlpatch with a bfloat16 object (no masters).
Measured on fixed prompts: the probability of even tokens before and after; and the mean reward of the last tenth of steps.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import rlpatch
from rlpatch.demo import tiny, worker
from rlpatch.versions import installed

FAMILIES = ("llama", "qwen3", "qwen3-tied", "gemma3", "phi3")
VARIANTS: dict[str, dict[str, Any]] = {
    "plain TRL, path (float32 + autocast)": {"patched": False, "from_path": True},
    "rlpatch, path (bfloat16 + masters)": {"patched": True, "from_path": True},
    "rlpatch, bfloat16 object (no masters)": {"patched": True, "from_path": False},
}


# ---- one batch -------------------------------------------------------------------------------------------------------


def _batch(model: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Log-probs of a fixed batch under autocast, and the gradient of their mean."""
    tokens = torch.arange(4 * 24).reshape(4, 24) * 7 % 61 + 3
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens).logits[:, :-1].float()
    picked = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])
    (-picked.mean()).backward()
    return picked.detach(), [p.grad.detach().float() for p in model.parameters()]


def numbers(folder: Path, families: tuple[str, ...] = FAMILIES) -> list[dict[str, Any]]:
    """One row per family; see the module's docstring."""
    from transformers import AutoModelForCausalLM

    from rlpatch.precision.choice import MASTERS, Choice
    from rlpatch.precision.model import Prepared

    rows = []
    for family in families:
        path = tiny.write_model(folder / family, family, dtype="bfloat16")
        picked, gradients = _batch(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))
        row: dict[str, Any] = {"family": family}
        for kind in ("rlpatch", "bfloat16 as it is"):
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
            if kind == "rlpatch":
                Prepared(model, Choice(MASTERS, "")).keep_residual(model)
            p, g = _batch(model)
            squares = sum(float(((a - b) ** 2).sum()) for a, b in zip(g, gradients, strict=True))
            whole = sum(float((b**2).sum()) for b in gradients)
            row[kind] = {
                "logp_difference_max": float((p - picked).abs().max()),
                "gradient_difference": (squares / whole) ** 0.5,
            }
        rows.append(row)
    return rows


# ---- learning --------------------------------------------------------------------------------------------------------


def _even(trainer: Any) -> float:
    """Probability of an even token after each of 64 fixed prompts, on average."""
    tokens = torch.arange(64 * 6).reshape(64, 6) * 11 % 61 + 3
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        probabilities = trainer.model(tokens).logits[:, -1].float().softmax(-1)
    return float(probabilities[:, ::2].sum(-1).mean())


def learning(folder: Path, steps: int, rate: float, seed: int = 0) -> list[dict[str, Any]]:
    """One row per variant; see the module's docstring."""
    path = str(tiny.write_model(folder / "learning", "llama", dtype="bfloat16"))
    rows = []
    for name, variant in VARIANTS.items():
        job = worker.Job(
            path, variant["patched"], steps=steps, seed=seed, dtype="bfloat16", from_path=variant["from_path"],
            config={
                "bf16": True, "learning_rate": rate, "per_device_train_batch_size": 32, "num_generations": 8,
                "max_completion_length": 4, "output_dir": str(folder / "out"), "disable_tqdm": True,
                "log_level": "error",
            },
        )  # fmt: skip
        rlpatch.apply(include=None if variant["patched"] else ["cpu_weights"], defaults=False)
        trainer = worker.make_trainer(job)
        before = [p.detach().float().clone() for p in trainer.model.parameters()]
        even, start = _even(trainer), time.perf_counter()
        result = worker.train(trainer, job)
        rewards = [row["reward"] for row in result["steps"]]
        tenth = max(1, steps // 10)
        after = [p.detach().float() for p in trainer.model.parameters()]
        moved = sum(int((a != b).sum()) for a, b in zip(after, before, strict=True))
        row = {
            "variant": name,
            "seed": seed,
            "even_probability": [even, _even(trainer)],
            "reward": [sum(rewards[:tenth]) / tenth, sum(rewards[-tenth:]) / tenth],
            "rewards": rewards,
            "weights_changed_share": moved / sum(a.numel() for a in after),
            "weights_twice_bytes": result["weights_twice_bytes"],
            "logp_difference": sum(r["logp_difference"] for r in result["steps"]) / steps,
            "seconds": time.perf_counter() - start,
            "precision": result["status"]["precision"],
        }
        rows.append(row)
        rlpatch.revert()
        del trainer
        gc.collect()
    return rows


# ---- the command -----------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Measure, print two tables, write JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m rlpatch.bench.precision", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200, help="of GRPO (default 200)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each variant (default 3)")
    parser.add_argument("--learning-rate", type=float, default=2e-5, help="default 2e-5")
    parser.add_argument("--out", help="write everything as JSON")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="rlpatch-precision-") as scratch:
        rows = numbers(Path(scratch))
        for row in rows:
            cells = [
                f"{kind}: log-probs {row[kind]['logp_difference_max']:.1e}, gradient {row[kind]['gradient_difference']:.1e}"
                for kind in row if kind != "family"
            ]  # fmt: skip
            print(f"{row['family']:12} {'; '.join(cells)}", flush=True)
        learned = []
        for seed in range(options.seeds):
            learned += learning(Path(scratch), options.steps, options.learning_rate, seed)
            print(f"seed {seed}: done", flush=True)
    for row in sorted(learned, key=lambda row: list(VARIANTS).index(row["variant"])):
        print(
            f"{row['variant']:40} seed {row['seed']} P(even) {row['even_probability'][0]:.3f} → "
            f"{row['even_probability'][1]:.3f}, reward {row['reward'][0]:.3f} → {row['reward'][1]:.3f}, "
            f"weights changed {100 * row['weights_changed_share']:.1f} %, "
            f"resident twice {row['weights_twice_bytes'] / 2**10:.0f} KiB, log-prob difference {row['logp_difference']:.1e}"
        )
    for name in VARIANTS:
        gains = [row["even_probability"][1] - row["even_probability"][0] for row in learned if row["variant"] == name]
        spread = statistics.stdev(gains) if len(gains) > 1 else 0.0
        print(f"{name:40} P(even) gains {statistics.mean(gains):+.3f} ± {spread:.3f} in {options.steps} steps")
    if options.out:
        result = {
            "command": f"python -m rlpatch.bench.precision --steps {options.steps} --seeds {options.seeds} "
            f"--learning-rate {options.learning_rate}",
            **{name: str(installed(name).version) for name in ("vllm", "trl", "transformers", "torch")},
            "numbers": rows,
            "learning": learned,
        }
        Path(options.out).write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
