"""GRPO's colocated generation as one cycle, while the trainer builds the engine itself (0.18 to 0.21).

``GRPOTrainer.__init__`` calls ``LLM(…)``; ``_generate_and_score_completions`` calls ``_move_model_to_vllm`` when
``state.global_step`` differs from ``_last_loaded_step``, then ``self.llm.generate``. There is no sleep mode. No other
trainer of these releases pushes into an engine of its own (for Online DPO see online_dpo_v0_18).
Delete when: the oldest supported TRL is 0.22.
"""

from __future__ import annotations

from rlpatch.adapters.trl import _own_engine
from rlpatch.patching import Patch
from rlpatch.registry import Adapter, Context

_GRPO = "trl.trainer.grpo_trainer"


def _patches(context: Context) -> list[Patch]:
    return _own_engine.patches(context, _GRPO, "GRPOTrainer")


ADAPTER = Adapter(
    capability="generation",
    library="trl",
    versions=">=0.18,<0.22",
    module=_GRPO,
    probe=lambda: _own_engine.missing(_GRPO, "GRPOTrainer"),
    patches=_patches,
    relies_on=(*_own_engine.relies(_GRPO, "GRPOTrainer"),),
)
