"""The allocator options that a person set survive vLLM's memory pool.

``CuMemAllocator.use_memory_pool`` ([0.20.1, 0.31)) switches expandable segments off around its pool, and on again, with a
bare ``_set_allocator_settings("expandable_segments:False")``: torch takes that for the whole configuration and drops
every other option of ``PYTORCH_CUDA_ALLOC_CONF`` (``max_split_size_mb``, ``garbage_collection_threshold``, …) for the
whole process. Here the full configuration is put in place inside the pool (with expandable segments off) and after it.
Fixed upstream in 0.31 (``device_allocator/alloc_conf.py``); releases up to 0.20.0 assert that expandable segments are
off and set nothing, so that there is nothing to keep (standby then stays off, see `_pool.expandable_segments_refused`).
Delete when: the oldest supported vLLM is 0.31.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from typing import Any

from rlpatch.adapters.vllm._platform import on_cpu
from rlpatch.patching import Patch
from rlpatch.registry import Adapter, Context
from rlpatch.relies import Relies


def _use_memory_pool(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    import torch

    conf = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    pool = wrapped(*args, **kwargs)
    if "expandable_segments:True" not in conf:
        return pool
    inside = re.sub(r"expandable_segments:True", "expandable_segments:False", conf)

    @contextlib.contextmanager
    def kept() -> Iterator[Any]:
        try:
            with pool as value:
                torch.cuda.memory._set_allocator_settings(inside)
                yield value
        finally:
            torch.cuda.memory._set_allocator_settings(conf)

    return kept()


def _relevant() -> str | None:
    if on_cpu():
        return "the engine does not run on CUDA"
    import inspect

    from vllm.device_allocator.cumem import CuMemAllocator

    # the call, not the words: from 0.31 on a comment has them
    if '_set_allocator_settings("expandable_segments:False")' not in inspect.getsource(CuMemAllocator.use_memory_pool):
        return "this vLLM leaves the allocator's other options alone"
    return None


def _patches(context: Context) -> list[Patch]:
    return [Patch("vllm.device_allocator.cumem", "CuMemAllocator.use_memory_pool", _use_memory_pool)]


ADAPTER = Adapter(
    capability="allocator_options",
    library="vllm",
    versions=">=0.9.2,<0.34",
    module="vllm.entrypoints.llm",
    relevant=_relevant,
    patches=_patches,
    relies_on=(
        Relies(
            "vllm.device_allocator.cumem:CuMemAllocator.use_memory_pool",
            contains=(
                "torch.cuda.memory._set_allocator_settings('expandable_segments:False')",
                "torch.cuda.memory._set_allocator_settings('expandable_segments:True')",
            ),
            versions=">=0.20.1,<0.31",
        ),
    ),
)
