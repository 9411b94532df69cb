"""The trainer that tests/gpu puts through everything: a small Qwen3 whose shapes suit a GPU's kernels, graphs on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import rlpatch
from rlpatch.demo import tiny, worker

PROMPTS = [[5 + (7 * i + j) % 900 for i in range(40)] for j in range(8)]
SHAPE = dict(
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=8,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=2048,
)


def patched_trainer(
    folder: Path,
    kv_bytes: int | None,
    steps: int = 4,
    lora: Any = None,
    from_path: bool = False,
    eager: bool = False,
    compile: str | None = None,
    **config: Any,
) -> Iterator[Any]:
    """The body of a fixture: GRPO under rlpatch, `kv_bytes` of KV cache, in bfloat16; `from_path` as in plain scripts.

    `kv_bytes`: None: what the utilization gives, so that there is a memory plan. `eager`: no CUDA graphs, whose memory
    torch counts as cached. `compile`: see `rlpatch.apply`.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    model = tiny.write_model(folder, "qwen3", words=4000, dtype="bfloat16", **SHAPE)
    rlpatch.apply(strict=True, defaults=False, compile=compile)
    job = worker.Job(
        str(model),
        True,
        steps=steps,
        dtype="bfloat16",
        lora=lora or {},
        from_path=from_path,
        engine={"enforce_eager": eager, "kv_cache_memory_bytes": kv_bytes},
        config={"vllm_max_model_length": 512, **config},
    )
    yield worker.make_trainer(job)
    rlpatch.revert()


def greedy(trainer: Any, prompts: list[list[int]] = PROMPTS, length: int = 48) -> list[list[int]]:
    """Greedy completions of `prompts` from the trainer's engine, one each, of at most `length` tokens."""
    generation = trainer.vllm_generation
    before = generation.temperature, generation.max_completion_length
    generation.temperature, generation.max_completion_length = 0.0, length
    try:
        _, completions, _, _ = generation.generate(prompts=prompts, images=None, num_generations=1)
    finally:
        generation.temperature, generation.max_completion_length = before
    return [list(ids) for ids in completions]


def optimizer_of(name: str, parameters: Any) -> Any:
    """AdamW, ``"fused"``, ``"foreach"`` or bitsandbytes' ``"adamw_8bit"``."""
    import pytest
    import torch

    if name == "adamw_8bit":
        return pytest.importorskip("bitsandbytes").optim.AdamW8bit(parameters, lr=1e-3)
    return torch.optim.AdamW(parameters, lr=1e-3, **({"fused": True} if name == "fused" else {"foreach": True}))
