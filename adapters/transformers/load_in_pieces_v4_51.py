"""Weights that come into the device's memory one by one, so that they can leave it one by one.

``from_pretrained`` with a device map, which is how TRL loads a model given as a path, first has torch's allocator reserve
all of the weights in one segment (``caching_allocator_warmup``), and torch gives a segment back only when nothing in it
is left. When the weights have moved into the engine, a single small tensor keeps the whole of it from the KV cache; this
is the likely reason why 14.8 GiB stayed in torch's cache with an 8B model given as a path and a LoRA, and 0.4 with a
model object (H200, bench/results/h200-8b-script-lora32-bytes-vllm0.25.1.json). Where the device holds the weights only
once, none of them could go before the last one has. Without it each large tensor has a segment of its own; loading asks
the driver for memory some hundred times. Expandable segments give back what is free in them: left alone.
Delete when: torch gives back parts of a segment, or transformers no longer reserves weights as one.
"""

from __future__ import annotations

from typing import Any

from rlpatch.patching import Patch
from rlpatch.registry import Adapter, Context
from rlpatch.relies import Relies


def _warm_up(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    from rlpatch.allocator import expandable

    return wrapped(*args, **kwargs) if expandable() else None


def _patches(context: Context) -> list[Patch]:
    return [Patch("transformers.modeling_utils", "caching_allocator_warmup", _warm_up)]


ADAPTER = Adapter(
    capability="load_in_pieces",
    library="transformers",
    versions=">=4.51,<5.25",
    module="transformers.modeling_utils",
    patches=_patches,
    relies_on=(Relies("transformers.modeling_utils:caching_allocator_warmup", positional=("model",)),),
)
