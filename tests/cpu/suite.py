"""The golden suite: every scenario trained once, in one process, plain or patched; results as JSON.

Run by test_golden.py in two fresh processes: ``python suite.py plain|patched FOLDER [SCENARIO …]``. Scenarios follow one
another in one process, so "a second trainer in the same process" is part of each of them. ``RLPATCH_TEST_SCENARIOS``
(names with commas between) leaves the others out, for releases that know fewer models.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import old_trl

import rlpatch
from rlpatch.demo import tiny, worker


@dataclass
class Scenario:
    """One training: a family of models, a precision, a trainer, and what is special about it.

    Attributes:
        resume_at: Train again from the checkpoint of this step.
        plain_fails: Plain TRL cannot train it at all.
        exact: Plain and patched do the same arithmetic in the same order, once `one_forward` is off, which leaves a pass
            out and rounds otherwise.
        lora: Arguments of ``peft.LoraConfig``; empty: full fine-tuning.
    """

    family: str
    dtype: str = "float32"
    trainer: str = "grpo"
    steps: int = 5
    words: int = tiny.WORDS
    config: dict[str, Any] = field(default_factory=dict)
    resume_at: int | None = None
    plain_fails: bool = False
    exact: bool = True
    lora: dict[str, Any] = field(default_factory=dict)


EVALUATE = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "per_device_eval_batch_size": 8,
    "save_strategy": "steps",
    "save_steps": 3,
}
# Adapters start at zero: a few fast steps, so that they mean something
FAST = {"learning_rate": 5e-3}
LORA = {"r": 8, "lora_alpha": 16}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

# MoE first: vLLM makes its expert-parallel group with the first engine of a process or never.
SCENARIOS: dict[str, Scenario] = {
    # Not exact: with one forward pass less, and the experts of transformers 5.23 round differently under gradients
    "qwen3-moe": Scenario("qwen3-moe", exact=False),
    # transformers 5 renames and fuses Mixtral's experts; vLLM refuses those names when plain TRL pushes them
    "mixtral": Scenario("mixtral", plain_fails=True),
    "qwen3-moe-lora": Scenario(
        "qwen3-moe", exact=False, config=FAST, lora={**LORA, "target_parameters": EXPERTS, "target_modules": ATTENTION}
    ),
    "qwen3-lora-beta-evaluate-save-resume": Scenario(
        "qwen3",
        steps=6,
        exact=False,
        config={**FAST, **EVALUATE, "beta": 0.04},
        resume_at=3,
        lora=LORA,
    ),
    "llama-lora-saved-embedding": Scenario(
        "llama",
        exact=False,
        config=FAST,
        lora={**LORA, "target_modules": ATTENTION, "modules_to_save": ["embed_tokens"]},
    ),
    "qwen3-evaluate-save-resume": Scenario(
        "qwen3",
        steps=6,
        config=EVALUATE,
        resume_at=3,
    ),
    "qwen3-tied-two-iterations": Scenario("qwen3-tied", steps=6, config={"num_iterations": 2}),
    "qwen3-odd-vocabulary": Scenario(
        "qwen3", words=70, config={"steps_per_generation": 4, "gradient_accumulation_steps": 2}
    ),
    "llama": Scenario("llama"),
    "llama-rloo": Scenario("llama", trainer="rloo"),
    "gemma3": Scenario("gemma3"),
    "phi3": Scenario("phi3"),
    # The engine keeps Conv1D weights transposed; the trainer multiplies by a view of other strides, which rounds otherwise
    "gpt2-transposed": Scenario("gpt2", exact=False),
    "qwen3-bfloat16": Scenario("qwen3", dtype="bfloat16"),
}


def chosen() -> dict[str, Scenario]:
    """The scenarios that ``RLPATCH_TEST_SCENARIOS`` asks for; all when it is unset."""
    names = [name.strip() for name in os.environ.get("RLPATCH_TEST_SCENARIOS", "").split(",") if name.strip()]
    unknown = set(names) - set(SCENARIOS)
    if unknown:
        raise ValueError(f"RLPATCH_TEST_SCENARIOS names {', '.join(sorted(unknown))}; there are {', '.join(SCENARIOS)}")
    return {name: scenario for name, scenario in SCENARIOS.items() if name in names or not names}


def digests(folder: Path) -> dict[str, str]:
    """Name -> digest of dtype, shape and bytes, for every tensor of a checkpoint folder."""
    from safetensors import safe_open

    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                tensor = tensors.get_tensor(name).contiguous()
                data = tensor.flatten().view(dtype=__import__("torch").uint8).numpy().tobytes()
                found[name] = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode() + data).hexdigest()
    return found


def copied_while(action: Any) -> int:
    """Bytes that `action` clones or casts into new tensors (what would be a second copy of the model on its device)."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func in (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default):
                self.count += result.numel() * result.element_size()
            return result

    with Watch() as watch:
        action()
    return watch.count


def run(name: str, scenario: Scenario, patched: bool, folder: Path) -> dict[str, Any]:
    model = tiny.write_model(folder / "models" / name, scenario.family, words=scenario.words, dtype=scenario.dtype)
    job = worker.Job(
        str(model),
        patched,
        steps=scenario.steps,
        dtype=scenario.dtype,
        trainer=scenario.trainer,
        output=str(folder / "runs" / name),
        config=scenario.config,
        lora=scenario.lora,
    )
    ours = {"defaults": False, "one_forward": not scenario.exact}
    rlpatch.apply(**(ours if patched else {"include": ["cpu_weights"]}))
    trainer = worker.make_trainer(job)
    frozen = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    result = worker.train(trainer, job)
    result["frozen_elements"] = sum(p.numel() for p in frozen.values())
    result["frozen_changed"] = sum(int((trainer.model.get_parameter(n) != p).sum()) for n, p in frozen.items())
    result["evaluations"] = [row for row in trainer.state.log_history if "eval_loss" in row]
    saved = folder / "saved" / name
    result["save_copied_bytes"] = copied_while(lambda: trainer.model.save_pretrained(saved, max_shard_size="100KB"))
    result["saved"] = digests(saved)
    index = saved / "model.safetensors.index.json"
    result["index"] = json.loads(index.read_text()) if index.is_file() else None  # adapters have none
    trainer.save_model(str(folder / "by_trainer" / name))
    result["saved_by_trainer"] = digests(folder / "by_trainer" / name)
    if scenario.resume_at is not None:
        checkpoint = folder / "runs" / name / f"checkpoint-{scenario.resume_at}"
        result["checkpoint"] = digests(checkpoint)
        again = worker.make_trainer(job)
        resumed = worker.train(again, job, resume_from_checkpoint=str(checkpoint))
        result["resumed"] = resumed["steps"]
        again.save_model(str(folder / "resumed" / name))
        result["saved_resumed"] = digests(folder / "resumed" / name)
    return result


def main() -> int:
    old_trl.bound_kv_cache()
    old_trl.make_importable()
    patched, folder = sys.argv[1] == "patched", Path(sys.argv[2])
    results: dict[str, Any] = {}
    for name, scenario in chosen().items():
        if sys.argv[3:] and name not in sys.argv[3:]:
            continue
        try:
            results[name] = run(name, scenario, patched, folder)
        except Exception:
            results[name] = {"error": traceback.format_exc()}
        finally:
            rlpatch.revert()
    (folder / "results.json").write_text(json.dumps(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
