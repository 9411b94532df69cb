"""GRPO's and RLOO's colocated generation as one cycle, while each builds its engine itself (0.22 to 0.27).

As in 0.18 (see generation_v0_18), and RLOO does the same. ``vllm_enable_sleep_mode`` came with 0.23: ``sleep(level=1)``
and an untagged ``wake_up()`` in 0.23 and 0.24; ``sleep(level=2)`` and tagged wakes from 0.25, which serves memory that
holds nothing when a push is skipped (trl#4296); ``reload_weights`` between wake and push from 0.26, which then serves
the base checkpoint. Where the weights are not shared, `_own_engine` has the push follow every such sleep.
Delete when: the oldest supported TRL is 0.28.
"""

from __future__ import annotations

from rlpatch.adapters.trl import _own_engine
from rlpatch.patching import Patch
from rlpatch.registry import Adapter, Context

_GRPO = "trl.trainer.grpo_trainer"


def _patches(context: Context) -> list[Patch]:
    return [
        *_own_engine.patches(context, _GRPO, "GRPOTrainer"),
        *_own_engine.patches(context, "trl.trainer.rloo_trainer", "RLOOTrainer"),
    ]


ADAPTER = Adapter(
    capability="generation",
    library="trl",
    versions=">=0.22,<0.28",
    module=_GRPO,
    probe=lambda: _own_engine.missing(_GRPO, "GRPOTrainer"),
    patches=_patches,
    relies_on=(*_own_engine.relies(_GRPO, "GRPOTrainer"),),
)
