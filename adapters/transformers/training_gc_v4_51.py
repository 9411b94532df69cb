"""Full collections during training do not walk what was there before it.

What a training step makes and drops (a LoRA's graphs, a rollout's log-probs) lets Python start full collections, and each
walks the whole process: the modules of torch, transformers and vLLM, the model's, the trainer's, all that training neither
makes nor drops. With a LoRA on an 8B model, 64 completions a step, on an H200, collections take 0.74 to 0.79 s of every
third step, and 0.07 with this adapter (``bench/results/h200-8b-lora32-64-sum-vllm0.25.1.json``). Plain TRL's are short,
because vLLM has frozen the trainer's heap for good when its engine was built; rlpatch thaws it (`graph_capture_gc`), since
what is frozen is never collected: a trainer that goes, its optimizer, its engine.

So the heap is frozen while ``train()`` runs, after one collection, and thawed when it returns or raises. What becomes
garbage in between is collected as ever if it was made in between.

Left alone: trainers without an engine of ours, and a heap of which somebody has frozen a part.
Delete when: the oldest supported Python collects old objects in small increments.
"""

from __future__ import annotations

from typing import Any

from rlpatch.collector import out_of_sight
from rlpatch.patching import Patch
from rlpatch.registry import Adapter, Context
from rlpatch.relies import Relies


def _train(wrapped: Any, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    from rlpatch import phases

    if not phases.of_parameters(trainer.model):
        return wrapped(*args, **kwargs)
    with out_of_sight():
        return wrapped(*args, **kwargs)


def _patches(context: Context) -> list[Patch]:
    return [Patch("transformers.trainer", "Trainer.train", _train)]


ADAPTER = Adapter(
    capability="training_gc",
    library="transformers",
    versions=">=4.51,<5.25",
    module="transformers.trainer",
    patches=_patches,
    relies_on=(Relies("transformers.trainer:Trainer.train"),),
)
