"""Online DPO, NashMD and XPO before 0.23 run as without rlpatch, and say so.

``OnlineDPOTrainer.__init__`` builds ``LLM(model=…, dtype=torch.float32)`` before there is an accelerator, in a process of
its own (no ``external_launcher``), so that its weights cannot be shared; ``_generate_vllm`` hands the whole
``state_dict`` to ``llm_engine.model_executor…load_weights`` before each generation, which finds no ``model_executor``
unless ``VLLM_ENABLE_V1_MULTIPROCESSING=0`` keeps the engine in this process.
Delete when: the oldest supported TRL is 0.23.
"""

from __future__ import annotations

from rlpatch.adapters.trl import _own_engine
from rlpatch.patching import Patch
from rlpatch.registry import Adapter, Context
from rlpatch.relies import Relies

_MODULE = "trl.trainer.online_dpo_trainer"


def _patches(context: Context) -> list[Patch]:
    return [_own_engine.notice(_MODULE, "OnlineDPOTrainer", "this TRL builds its engine in a process of its own")]


def _probe() -> str | None:
    import sys

    trainer = sys.modules[_MODULE].OnlineDPOTrainer
    return "it builds its engine in this process" if hasattr(trainer, "_move_model_to_vllm") else None


ADAPTER = Adapter(
    capability="online_dpo",
    library="trl",
    versions=">=0.18,<0.23",
    module=_MODULE,
    probe=_probe,
    patches=_patches,
    relies_on=(Relies(f"{_MODULE}:LLM"),),
)
