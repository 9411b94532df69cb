"""``python -m rlpatch plan``: what fits on a GPU, without having one. Needs neither torch nor vLLM nor TRL."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rlpatch.errors import UsageError
from rlpatch.memory.engine import Engine
from rlpatch.memory.model import ModelShape, read
from rlpatch.memory.planning import FILL, GENERATING, TRAINING, Plan, first_that_fits, plan
from rlpatch.memory.sizes import parse_device, parse_size, show
from rlpatch.memory.training import FULL, TILES, Training

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = 1
_EXPANDED = (
    "torch's allocator expands its segments, because it would not fit otherwise, or only just: some 3 ms a step per GiB of "
    "gradients"
)
_PARKED = (
    "the optimizer's state waits in host memory between steps, because it would not fit otherwise: one copy out and one "
    "back per step; the host needs twice its size free"
)


def shapes() -> dict[str, dict[str, Any]]:
    """The bench's shapes as configs."""
    from rlpatch.bench.shapes import POSITIONS, SHAPES, VOCABULARY

    return {
        name: {
            **{key: value for key, value in shape.items() if key != "tied"},
            "model_type": "qwen3",
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": POSITIONS,
            "tie_word_embeddings": shape["tied"],
            "dtype": "bfloat16",
        }
        for name, shape in SHAPES.items()
    }


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(prog="python -m rlpatch plan", description=__doc__)
    made.add_argument(
        "--model", required=True, metavar="M", help=f"checkpoint folder, config.json or {', '.join(shapes())}"
    )
    made.add_argument(
        "--gpu", required=True, metavar="G", help="80GiB, 80GB, 85899345920, or a card: H100, A100-80GB, L4, …"
    )

    train = made.add_argument_group("training")
    train.add_argument("--lora", type=int, default=0, metavar="R", help="LoRA of rank R (default: the whole model)")
    train.add_argument("--lora-targets", default="all-linear", metavar="A,B", help="layers that it adapts (all-linear)")
    train.add_argument(
        "--lora-casts", action="store_true",
        help="PEFT casts the adapters' inputs, as with exclude='lora_casts', dropout or DoRA (default: they are left out)",
    )  # fmt: skip
    train.add_argument("--load-in-4bit", action="store_true", help="the base in bitsandbytes' 4 bits (QLoRA)")
    train.add_argument("--optim", default="adamw_torch_fused", help="transformers' name (default adamw_torch_fused)")
    train.add_argument(
        "--park-optimizer", action=argparse.BooleanOptionalAction,
        help="its state in host memory between steps (default: where it does not fit otherwise)",
    )  # fmt: skip
    train.add_argument(
        "--precision", choices=("bf16", "masters", "fp32"), default="bf16",
        help="a model object in bf16 (default); a plain script's model under rlpatch: bf16 with a float32 residual "
        "stream, and float32 masters of what is trained; or a float32 trainer beside a bf16 engine",
    )  # fmt: skip
    train.add_argument(
        "--per-device-train-batch-size", "--batch", type=int, metavar="N", help="default: --num-generations"
    )
    train.add_argument("--num-generations", type=int, default=8, metavar="N", help="completions per prompt (default 8)")
    train.add_argument("--gradient-accumulation-steps", type=int, default=1, metavar="N")
    train.add_argument("--steps-per-generation", type=int, metavar="N", help="default: the accumulation steps")
    train.add_argument("--max-length", type=int, metavar="N", help="tokens of prompt and completion together")
    train.add_argument("--max-prompt-length", type=int, default=512, metavar="N", help="default 512")
    train.add_argument(
        "--max-completion-length", type=int, metavar="N", help="default 256, or what --max-length leaves"
    )
    train.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=True)
    train.add_argument("--beta", type=float, default=0.0, help="above 0: a reference model, unless there is a LoRA")
    train.add_argument("--attention", choices=("sdpa", "flash", "eager"), default="sdpa")
    train.add_argument("--full-logits", action="store_true", help="TRL before 1.15 without Liger: all logits at once")
    train.add_argument(
        "--expandable-segments", action=argparse.BooleanOptionalAction,
        help="of torch's allocator (default: where it does not fit otherwise, with one process)",
    )  # fmt: skip
    train.add_argument(
        "--processes", type=int, default=1, metavar="N", help="data-parallel GPUs; each holds all of this"
    )

    engine = made.add_argument_group("engine")
    engine.add_argument("--kv-cache-dtype", default="auto", metavar="D", help="auto, fp8, bfloat16, …")
    engine.add_argument("--block-size", type=int, metavar="N", help="default: vLLM's choice, counted as 16")
    engine.add_argument(
        "--max-num-seqs", type=int, metavar="N", help="default: batch × steps per generation, as TRL sets it"
    )
    engine.add_argument(
        "--max-num-batched-tokens", type=int, default=4096, metavar="N", help="default 4096, as TRL sets it"
    )
    engine.add_argument("--enforce-eager", action="store_true", help="no CUDA graphs")
    engine.add_argument("--lora-slots", action="store_true", help="vLLM's LoRA kernels instead of the fold")
    engine.add_argument("--no-sharing", action="store_true", help="trainer and engine with weights of their own")
    engine.add_argument("--gpu-memory-utilization", type=float, metavar="U", help="check this one")
    engine.add_argument("--reserve", metavar="SIZE", help="held by others: reward models, other processes, a display")
    engine.add_argument(
        "--margin", metavar="SIZE", help="stays free (default: a hundredth of the GPU, 256MiB at least)"
    )
    made.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    return made


def main(argv: Sequence[str]) -> int:
    """Print the plan; exit status 0 it fits, 1 it does not, 2 usage."""
    options = parser().parse_args(argv)
    try:
        model, training, made = _plan(options)
    except UsageError as error:
        print(f"rlpatch plan: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(
            json.dumps(
                {"schema": SCHEMA, "model": model.name, "parameters": model.parameters, **made.as_dict()}, indent=1
            )
        )
    else:
        from rich.console import Console

        _show(made, model, training, Console(highlight=False))
    return 1 if made.refusal else 0


def _plan(options: argparse.Namespace) -> tuple[ModelShape, Training, Plan]:
    model = read(options.model, shapes(), "--model")
    device = parse_device(options.gpu, "--gpu")
    if options.num_generations < 2:
        raise UsageError(f"--num-generations {options.num_generations}: GRPO needs at least 2")
    if options.lora < 0:
        raise UsageError(f"--lora {options.lora}: a rank is 1 or more (0: no LoRA)")
    if options.lora > model.hidden:
        raise UsageError(
            f"--lora {options.lora}: a rank above the model's hidden size {model.hidden} is no low-rank adapter"
        )
    if options.lora_casts and not options.lora:
        raise UsageError("--lora-casts: only with --lora R")
    if options.load_in_4bit and not options.lora:
        raise UsageError("--load-in-4bit: a 4-bit base cannot be trained itself; add --lora R")
    if options.precision != "bf16" and options.load_in_4bit:
        raise UsageError(f"--precision {options.precision} with --load-in-4bit: the 4-bit base has no such weights")
    if options.beta < 0:
        raise UsageError(f"--beta {options.beta}: 0 or more")
    completion = options.max_completion_length
    if options.max_length is not None:
        if options.max_length <= options.max_prompt_length:
            raise UsageError(
                f"--max-length {options.max_length} leaves nothing beside --max-prompt-length {options.max_prompt_length}"
            )
        left = options.max_length - options.max_prompt_length
        if completion is not None and completion != left:
            raise UsageError(
                f"--max-length {options.max_length} and --max-completion-length {completion} with --max-prompt-length "
                f"{options.max_prompt_length} contradict; give one of the first two"
            )
        completion = left
    batch = (
        options.num_generations if options.per_device_train_batch_size is None else options.per_device_train_batch_size
    )
    steps = options.steps_per_generation or options.gradient_accumulation_steps
    generated = batch * steps * options.processes
    warnings: tuple[str, ...] = ()
    if batch > 0 and generated % options.num_generations:
        warnings = (
            f"a rollout of {generated} completions (batch × steps per generation × processes) is no multiple of "
            f"--num-generations {options.num_generations}; TRL refuses that",
        )
    training = Training(
        rank=options.lora,
        targets=options.lora_targets if options.lora_targets == "all-linear"
        else tuple(name.strip() for name in options.lora_targets.split(",") if name.strip()),
        quantized=options.load_in_4bit,
        input_casts=options.lora_casts or options.load_in_4bit,
        dtype="float32" if options.precision == "fp32" else "bfloat16",
        residual="float32" if options.precision == "masters" else None,
        masters=options.precision == "masters" and not options.lora,
        optim=options.optim,
        batch=batch,
        prompt=options.max_prompt_length,
        completion=256 if completion is None else completion,
        accumulation=options.gradient_accumulation_steps,
        generate_every=steps,
        checkpointing=options.gradient_checkpointing,
        reference=options.beta > 0 and not options.lora,
        head=FULL if options.full_logits else TILES,
        attention=options.attention,
        processes=options.processes,
    )  # fmt: skip
    if training.length > model.positions:
        raise UsageError(
            f"{training.length} tokens of prompt and completion are more than the model's max_position_embeddings "
            f"{model.positions}"
        )
    slots = options.lora_slots or (options.load_in_4bit and options.lora > 0)  # a fold needs 16 bits
    if options.lora_slots and not options.lora:
        raise UsageError("--lora-slots: only with --lora R")
    engine = Engine(
        kv_dtype=options.kv_cache_dtype,
        block_size=16 if options.block_size is None else options.block_size,
        told_block_size=options.block_size is not None,
        max_num_seqs=batch * steps if options.max_num_seqs is None else options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_model_len=training.length,
        eager=options.enforce_eager,
        lora_slots=int(slots),
        lora_rank=options.lora if slots else 0,
        shares=not options.no_sharing,
    )
    sizes: dict[str, Any] = dict(
        margin=None if options.margin is None else parse_size(options.margin, "--margin"),
        others=0 if options.reserve is None else parse_size(options.reserve, "--reserve"),
        utilization=options.gpu_memory_utilization,
    )

    def make(parked: bool, expanded: bool) -> tuple[Training, Plan]:
        one = replace(training, parked=parked, expandable_segments=expanded)
        return one, plan(model, one, engine, device, **sizes)

    parking = "auto" if options.park_optimizer is None else options.park_optimizer  # as `apply` does
    expanding = options.expandable_segments
    if expanding is None:
        expanding = "auto" if training.processes == 1 else False
    training, made = first_that_fits(parking, expanding, make)
    if training.expandable_segments and options.expandable_segments is None:
        made = replace(made, notes=(*made.notes, _EXPANDED))
    if training.parked and options.park_optimizer is None:
        made = replace(made, notes=(*made.notes, _PARKED))
    made = replace(made, warnings=(*warnings, *made.warnings))
    return model, training, made


def _waiting(made: Plan, training: Training) -> Iterator[tuple[str, str]]:
    """Of a rollout of several micro-batches: how many forward passes the loss needs not make again (`one_forward`)."""
    steps = training.generate_every or training.accumulation
    if steps > 1 and training.accumulation % steps == 0:
        kept = min(1 + made.passes_beside(), steps)
        yield "scored once for both", f"{kept} of {steps} micro-batches; {show(made.waiting)} each while they wait"


def _show(made: Plan, model: ModelShape, training: Training, console: Console) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    how = f"LoRA r={training.rank}" if training.rank else "full fine-tuning"
    console.print(
        Text.assemble(
            (f"{model.name}, {model.parameters / 1e9:.2f} G weights, {how}", "bold"),
            f" on {show(made.device)}; {training.batch} × {training.length} tokens, {training.optim}",
        )
    )
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for name in ("generating", "training"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("how", overflow="fold")
    for term in made.terms:
        size, mark = show(term.bytes), "" if term.exact else "≈ "
        table.add_row(
            Text(term.name),
            Text("" if term.resident == TRAINING else size),
            Text(
                "" if term.resident == GENERATING else show(term.peak_bytes) if term.peak_bytes else f"({size})",
                "" if term.peak_bytes else "dim",
            ),
            Text(mark + term.formula, "dim"),
        )
    left = f" of {show(made.kv_left_bytes)} that are left" if made.sized_by == FILL else ""
    blocks = (
        f"{made.sized_by}{left}: {made.kv_blocks:,} blocks of {made.block_size} tokens, {show(made.block_bytes)} each"
    )
    table.add_row(
        Text("KV cache", "bold"), Text(show(made.kv_cache_memory_bytes), "bold"), Text("-"), Text(blocks, "dim")
    )
    total = made.generating + made.kv_cache_memory_bytes
    table.add_row(Text("total", "bold"), Text(show(total), "bold"), Text(show(made.training), "bold"),
                  Text(f"training peaks at: {made.peak}; sizes in brackets are not there then", "dim"))  # fmt: skip
    console.print(table)
    if made.refusal is None:
        for label, text in (
            ("gpu_memory_utilization", f"{made.gpu_memory_utilization:.4f}"),
            ("kv_cache_memory_bytes", f"{made.kv_cache_memory_bytes} ({made.kv_tokens:,} tokens)"),
            (
                "longest context in rollouts",
                f"{made.rollout_context:,} tokens for each of {made.sequences} sequences at once",
            ),
            ("longest context in training", f"{made.training_context:,} tokens, {training.batch} sequences at once"),
            *_waiting(made, training),
        ):
            console.print(Text.assemble((f"{label}: ", "bold"), text))
    for note in made.notes:
        console.print(Text(f"note: {note}", "cyan"))
    for warning in made.warnings:
        console.print(Text(f"warning: {warning}", "yellow"))
    if made.refusal is not None:
        console.print(Text.assemble(("does not fit: ", "bold red"), made.refusal))
