"""Fewer KV blocks than the engine was built with: for a KV cache that came back with a part of its memory only.

vLLM's ``BlockPool`` hands out the blocks of its free queue and judges by ``num_gpu_blocks`` whether it is empty. An engine
at rest has all blocks but block 0 (a placeholder) in that queue: those that are not backed are taken out of it and put
back later. Scheduling, preemption and the prefix cache follow by themselves. What does not follow is a request that could
never fit: vLLM checks at its start that one sequence of ``max_model_len`` fits, and later waits for blocks for ever; so
such a request is refused when it arrives.
"""

from __future__ import annotations

import logging
from typing import Any

from rlpatch.engine import Engine
from rlpatch.errors import StandbyError

logger = logging.getLogger("rlpatch")

_LEAST = 2  # block 0 is never handed out


class BlockLimit:
    """How many of an engine's KV blocks may be used: those with ids below `usable`.

    Attributes:
        total: Blocks that the engine was built with.
        usable: Blocks in use now, block 0 included.
        scheduler: vLLM's.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.scheduler = engine.core.scheduler
        self._pool = self.scheduler.kv_cache_manager.block_pool
        self._withheld: list[Any] = []
        self.total = self.usable = int(self._pool.num_gpu_blocks)

    def use(self, blocks: int | None) -> None:
        """Use the first `blocks` from now on, or all of them (None). The engine is at rest.

        Raises:
            StandbyError: fewer than 2, or more than there are; or a request still holds blocks.
        """
        blocks = self.total if blocks is None else blocks
        if blocks == self.usable:
            return
        if not _LEAST <= blocks <= self.total:
            raise StandbyError(
                f"{blocks} of {self.total} KV blocks cannot serve a request, at least {_LEAST} are needed; free memory "
                "before generating, or lower vllm_gpu_memory_utilization; the trainer and its weights are intact"
            )
        pool = self._pool
        held = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
        if held:
            raise StandbyError(f"{held} KV blocks are in use; their number can change between rollouts only")
        queue = pool.free_block_queue
        for block in self._withheld:
            queue.append(block)
        self._withheld = [block for block in pool.blocks[blocks:] if not block.is_null]
        for block in self._withheld:
            queue.remove(block)
        pool.num_gpu_blocks = self.usable = blocks

    def describe(self) -> dict[str, int]:
        """Plain data for ``status()``."""
        return {"usable": self.usable, "total": self.total}

    def check(self, request: Any) -> None:
        """Raise StandbyError for a request (vLLM's) that needs more blocks than may be used."""
        if self.usable == self.total:
            return
        longest = self._engine.llm.llm_engine.model_config.max_model_len
        tokens = min(request.num_prompt_tokens + (request.max_tokens or 0), longest)
        groups = self.scheduler.kv_cache_config.kv_cache_groups
        needed = sum(-(-tokens // group.kv_cache_spec.block_size) for group in groups)
        if needed > self.usable - 1:
            raise StandbyError(
                f"a request of up to {tokens} tokens needs {needed} KV blocks, and {self.usable - 1} of "
                f"{self.total - 1} came back: the device has no room for the others. Free memory before generating, "
                "shorten prompts or completions, or lower vllm_gpu_memory_utilization; the trainer's weights are intact"
            )
