"""GOLD's colocated generation as one cycle, while the trainer builds the engine itself (0.25 to 0.29).

``GOLDTrainer.__init__`` calls ``LLM(…)`` and keeps it as ``vllm_engine``; a callback calls ``_move_model_to_vllm`` after
every ``vllm_sync_frequency`` steps. With shared weights the engine is up to date after each step, whatever that says.
Delete when: the oldest supported TRL is 1.0.
"""

from __future__ import annotations

from rlpatch.adapters.trl import _own_engine
from rlpatch.patching import Patch
from rlpatch.registry import Adapter, Context
from rlpatch.relies import Relies

_MODULE = "trl.experimental.gold.gold_trainer"


def _patches(context: Context) -> list[Patch]:
    return _own_engine.patches(context, _MODULE, "GOLDTrainer")


ADAPTER = Adapter(
    capability="gold",
    library="trl",
    versions=">=0.25,<1.0",
    module=_MODULE,
    probe=lambda: _own_engine.missing(_MODULE, "GOLDTrainer"),
    patches=_patches,
    relies_on=(Relies(f"{_MODULE}:LLM"), Relies(f"{_MODULE}:GOLDTrainer._move_model_to_vllm")),
)
