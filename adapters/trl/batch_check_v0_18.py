"""The check of ``generation_batch_size`` against the batch of all processes, as TRL 0.18.0–0.19.0 meant it.

``GRPOConfig.__post_init__`` tests ``generation_batch_size % per_device_train_batch_size * num_processes != 0``, which
Python reads as ``(a % b) * n``: a generation batch that the micro batch of one process divides passes, whatever the number
of processes, and ``steps_per_generation = generation_batch_size // (b * n)`` then silently drops the rest (or becomes 0).
After the release's own ``__post_init__`` this tests what its message says. Fixed upstream in 0.19.1.
Delete when: the oldest supported TRL is 0.19.1.
"""

from __future__ import annotations

from typing import Any

from rlpatch.patching import Patch
from rlpatch.registry import Adapter, Context
from rlpatch.relies import Relies


def _post_init(wrapped: Any, config: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    result = wrapped(*args, **kwargs)
    step = config.per_device_train_batch_size * config.world_size
    if config.generation_batch_size % step:
        from rlpatch.errors import UsageError

        raise UsageError(
            f"generation_batch_size ({config.generation_batch_size}) must be divisible by the global batch size ({step} = "
            f"{config.world_size} × per_device_train_batch_size={config.per_device_train_batch_size}); this release "
            "of TRL lets it pass by mistake and drops the remainder. Set it to a multiple"
        )
    return result


def _patches(context: Context) -> list[Patch]:
    return [Patch("trl.trainer.grpo_config", "GRPOConfig.__post_init__", _post_init)]


ADAPTER = Adapter(
    capability="batch_check",
    library="trl",
    versions=">=0.18,<0.19.1",
    module="trl",
    patches=_patches,
    relies_on=(
        Relies(
            "trl.trainer.grpo_config:GRPOConfig.__post_init__",
            contains=("self.generation_batch_size % self.per_device_train_batch_size * num_processes != 0",),
        ),
    ),
)
