"""The engine's constructor: give it what a shared, standby-capable engine needs, and tell the pair when it is complete.

TRL passes no extra keyword arguments to ``vllm.LLM``, so the constructor itself is wrapped; it acts only while a pair is
being built (`rlpatch.phases.building`), other engines in the process are left alone.
``LLM.__init__(model, *, …, **kwargs)`` hands unknown keywords to ``EngineArgs`` (``load_format``, ``enable_sleep_mode``,
``moe_backend``), the same in every release read from 0.9.2 to 0.33.0.
Delete when: TRL lets a script pass engine arguments, or vLLM has a plugin point for them.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from rlpatch.adapters.vllm._reach import BLOCKS, REACHED
from rlpatch.patching import Patch, Wrapper
from rlpatch.registry import Adapter, Context
from rlpatch.relies import Relies

if TYPE_CHECKING:
    from rlpatch.memory.budget import Release

_CPU_SPACE = "VLLM_CPU_KVCACHE_SPACE"  # in GiB; overrides every argument

# How many positional arguments mean that lora_request is among them. ``generate(prompts, sampling_params,
# prompt_token_ids, use_tqdm, lora_request)`` up to 0.10.1, keyword-only since; ``chat(messages, sampling_params,
# use_tqdm, lora_request)``.
_GENERATE_LORA, _CHAT_LORA = 5, 4


def _init(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    from rlpatch import phases

    pair = phases.building()
    if pair is None or pair.engine is not None:
        return wrapped(*args, **kwargs)
    from vllm.platforms import current_platform

    # KV memory can only be released when it was allocated from vLLM's own pool, which sleep mode switches on. The CPU
    # backend refuses sleep mode and needs no pool.
    kwargs["enable_sleep_mode"] = (
        pair.wants_standby or pair.upstream_sleep
    ) and current_platform.is_sleep_mode_available()
    kwargs.update(pair.engine_arguments())
    kwargs.update(pair.plan_memory(kwargs, _release()))
    with pair.compiling(kwargs):
        wrapped(*args, **kwargs)
    pair.joined(instance)
    return None


def _release() -> Release:
    """What a memory plan has to know of this vLLM."""
    from dataclasses import fields

    from vllm import envs
    from vllm.engine.arg_utils import EngineArgs

    from rlpatch.adapters.vllm._platform import on_cpu
    from rlpatch.memory.budget import Release

    space = os.environ.get(_CPU_SPACE)
    return Release(
        takes_bytes="kv_cache_memory_bytes" in {entry.name for entry in fields(EngineArgs)},
        counts_graphs=bool(getattr(envs, "VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS", False)),
        sized_by=f"{_CPU_SPACE}={space}" if space and on_cpu() else None,
    )


def _rolled(lora_request: int) -> Wrapper:
    def generate(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        from rlpatch import phases

        pair = phases.of_engine(instance)
        if pair is None:
            return wrapped(*args, **kwargs)
        with pair.rollout():  # whoever calls the engine directly gets the policy and the KV cache, too
            if pair.lora_request is not None and len(args) < lora_request and kwargs.get("lora_request") is None:
                kwargs["lora_request"] = pair.lora_request
            return wrapped(*args, **kwargs)

    return generate


def _sleep(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    from rlpatch import phases

    result = wrapped(*args, **kwargs)
    pair = phases.of_engine(instance)
    level = int(kwargs.get("level", args[0] if args else 1))
    if pair is not None and not pair.shares and level >= 2 and pair.on_discarded is not None:
        pair.on_discarded()
    return result


def _wake_up(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    from rlpatch import phases

    pair = phases.of_engine(instance)
    tags = kwargs.get("tags", args[0] if args else None)
    if pair is not None and pair.standby is not None and pair.standby.released and tags is None:
        # Only the KV cache is out. Before 0.28 vLLM's allocator maps what is mapped once more when no tag is given.
        return pair.wake()
    return wrapped(*args, **kwargs)


def _add_request(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    from rlpatch import phases

    limit = phases.limit_of(instance)
    if limit is not None:
        limit.check(kwargs.get("request", args[0] if args else None))
    return wrapped(*args, **kwargs)


def _patches(context: Context) -> list[Patch]:
    return [
        Patch("vllm.entrypoints.llm", "LLM.__init__", _init),
        Patch("vllm.entrypoints.llm", "LLM.generate", _rolled(_GENERATE_LORA)),
        Patch("vllm.entrypoints.llm", "LLM.chat", _rolled(_CHAT_LORA)),
        Patch("vllm.entrypoints.llm", "LLM.sleep", _sleep),
        Patch("vllm.entrypoints.llm", "LLM.wake_up", _wake_up),
        Patch("vllm.v1.core.sched.scheduler", "Scheduler.add_request", _add_request),
    ]


ADAPTER = Adapter(
    capability="engine",
    library="vllm",
    versions=">=0.9.2,<0.34",
    module="vllm.entrypoints.llm",
    patches=_patches,
    relies_on=(
        Relies("vllm.entrypoints.llm:LLM.__init__", parameters=("**",)),
        Relies("vllm.entrypoints.llm:LLM.generate", positional=("prompts",), parameters=("lora_request",)),
        Relies("vllm.entrypoints.llm:LLM.chat", positional=("messages", "sampling_params", "use_tqdm", "lora_request")),
        Relies("vllm.engine.arg_utils:EngineArgs", parameters=("enable_sleep_mode", "quantization", "seed")),
        # rlpatch.load, as TRL: needs shared weights, hence not asked of older releases
        Relies("vllm.engine.arg_utils:EngineArgs.logprobs_mode", versions=">=0.17"),
        # the memory plan; before, by its utilization alone
        Relies(
            "vllm.engine.arg_utils:EngineArgs",
            parameters=("gpu_memory_utilization", "max_model_len", "max_num_seqs", "max_num_batched_tokens"),
        ),
        Relies("vllm.engine.arg_utils:EngineArgs.kv_cache_memory_bytes", versions=">=0.10.2"),
        Relies("vllm.platforms:current_platform"),
        Relies("vllm.platforms.interface:Platform.is_sleep_mode_available"),
        *REACHED,
        *BLOCKS,
    ),
)
