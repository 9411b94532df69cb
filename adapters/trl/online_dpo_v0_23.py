"""Online DPO's colocated generation as one cycle (0.23 to 0.25).

``OnlineDPOTrainer.__init__`` builds ``LLM(**vllm_kwargs)``; ``_generate_vllm_colocate`` calls
``_move_model_to_vllm`` before every generation. There is no sleep mode. NashMD and XPO inherit the engine and never use it
(see online_dpo_v0_26).
Delete when: the oldest supported TRL is 0.26.
"""

from __future__ import annotations

from rlpatch.adapters.trl import _own_engine
from rlpatch.patching import Patch
from rlpatch.registry import Adapter, Context

_MODULE = "trl.trainer.online_dpo_trainer"


def _patches(context: Context) -> list[Patch]:
    return _own_engine.patches(context, _MODULE, "OnlineDPOTrainer")


ADAPTER = Adapter(
    capability="online_dpo",
    library="trl",
    versions=">=0.23,<0.26",
    module=_MODULE,
    probe=lambda: _own_engine.missing(_MODULE, "OnlineDPOTrainer"),
    patches=_patches,
    relies_on=(*_own_engine.relies(_MODULE, "OnlineDPOTrainer"),),
)
