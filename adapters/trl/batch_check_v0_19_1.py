"""TRL 0.19.1 and later check ``generation_batch_size`` against the batch of all processes as their message says.

Delete when: the oldest supported TRL is 0.19.1 (together with batch_check_v0_18).
"""

from __future__ import annotations

from rlpatch.adapters.trl import _source
from rlpatch.registry import Adapter


def _probe() -> str | None:
    source = "".join(_source.text("trainer/grpo_config.py").split())
    return "it has the check of 0.18" if "%self.per_device_train_batch_size*num_processes" in source else None


ADAPTER = Adapter(
    capability="batch_check",
    library="trl",
    versions=">=0.19.1,<1.17",
    module="trl",
    probe=_probe,
    native=True,
)
