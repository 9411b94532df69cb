"""Online DPO's colocated generation as one cycle (0.26 and later).

As in 0.23 (see online_dpo_v0_23), in ``trl.experimental``; it never moved to ``VLLMGeneration``. From 0.28 it has a sleep
mode, and pushes only when ``state.global_step`` has changed: with gradient accumulation every generation but the step's
first comes from weights that level 2 discarded (1.16 still). `_own_engine` has the push follow every such sleep.
NashMD and XPO (to 1.13) inherit the engine and never generate with it: they call ``model.generate`` with what
``use_vllm`` leaves of the generation settings, which fails in the first step, with rlpatch as without.
Delete when: Online DPO generates through ``VLLMGeneration``.
"""

from __future__ import annotations

from rlpatch.adapters.trl import _own_engine
from rlpatch.patching import Patch
from rlpatch.registry import Adapter, Context

_MODULE = "trl.experimental.online_dpo.online_dpo_trainer"


def _patches(context: Context) -> list[Patch]:
    return _own_engine.patches(context, _MODULE, "OnlineDPOTrainer")


ADAPTER = Adapter(
    capability="online_dpo",
    library="trl",
    versions=">=0.26,<1.17",
    module=_MODULE,
    probe=lambda: _own_engine.missing(_MODULE, "OnlineDPOTrainer"),
    patches=_patches,
    relies_on=(*_own_engine.relies(_MODULE, "OnlineDPOTrainer"),),
)
