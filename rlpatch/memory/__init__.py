"""The memory plan: what is resident in each phase, and how much is left for the KV cache. Arithmetic; imports no torch.

`plan` takes a `ModelShape`, a `Training`, an `Engine` and the size of the device and returns a `Plan`. `describe` makes
the first three from a live TRL trainer, before its engine exists, and `plan_for` does both.
"""

from rlpatch.memory.engine import Engine
from rlpatch.memory.live import describe, plan_for
from rlpatch.memory.model import ModelShape, from_config, read
from rlpatch.memory.planning import Plan, Term, default_margin, fit_blocks, plan
from rlpatch.memory.sizes import parse_device, parse_size
from rlpatch.memory.training import Training

__all__ = [
    "Engine",
    "ModelShape",
    "Plan",
    "Term",
    "Training",
    "default_margin",
    "describe",
    "fit_blocks",
    "from_config",
    "parse_device",
    "parse_size",
    "plan",
    "plan_for",
    "read",
]
