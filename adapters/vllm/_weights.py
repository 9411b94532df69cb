"""Filling an engine from the trainer's memory, and keeping upstream's hands off shared weights, in every release."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from rlpatch.errors import SharingError
from rlpatch.patching import Patch, Wrapper
from rlpatch.relies import Relies

if TYPE_CHECKING:
    import torch

    from rlpatch.phases import Colocation

logger = logging.getLogger("rlpatch")

LOAD_FORMAT = "rlpatch"


@lru_cache(maxsize=1)
def trainer_memory_loader() -> type:
    """The loader: a ``BaseModelLoader`` whose ``load_weights`` feeds the trainer's tensors to the model's own."""
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    from rlpatch import phases
    from rlpatch.sharing.trace import WriteGuard, storage_key

    class TrainerMemoryLoader(BaseModelLoader):
        """Fill the engine from the trainer whose engine is being built; anything else loads from disk as usual."""

        crowded: Any = None

        def download_model(self, model_config: Any) -> None:
            """Nothing to download: the weights are in this process."""

        def load_model(self, *args: Any, **kwargs: Any) -> Any:
            pair = phases.building()
            if pair is None or pair.sharing is not None:
                return super().load_model(*args, **kwargs)
            with pair.constructing(outside_the_pool) as self.crowded:
                return super().load_model(*args, **kwargs)

        def _from_disk(self, model: Any, model_config: Any) -> None:
            config = dataclasses.replace(self.load_config, load_format="auto")
            DefaultModelLoader(config).load_weights(model, model_config)

        def load_weights(self, model: Any, model_config: Any) -> None:
            try:
                self._load_weights(model, model_config)
            finally:
                if self.crowded is not None:
                    self.crowded.finish()

        def _load_weights(self, model: Any, model_config: Any) -> None:
            pair = phases.building()
            if pair is None:
                refuse_overwriting(model)
            elif v0_engine():
                pair.refuse("vLLM runs its V0 engine, which rlpatch does not know; unset VLLM_USE_V1")
            sharing = pair.loading() if pair is not None and pair.sharing is None else None
            if pair is None or sharing is None:  # e.g. a draft model loaded beside the policy
                self._from_disk(model, model_config)
                return
            try:
                sharing.fill(model, model.load_weights)
                give_back(next(model.parameters()).device)
                missing = [n for n, p in model.named_parameters() if storage_key(p) not in sharing.written]
                if missing:
                    logger.info("rlpatch: the trainer has no %s; loading it from disk", ", ".join(missing))
                    with WriteGuard(sharing.written):
                        self._from_disk(model, model_config)
            except SharingError as error:
                pair.refuse(str(error))
                self._from_disk(model, model_config)

    return TrainerMemoryLoader


@lru_cache(maxsize=1)
def register_loader() -> None:
    """Register the loader under `LOAD_FORMAT` (``@register_model_loader``, official since 0.10.1)."""
    from vllm.model_executor.model_loader import register_model_loader

    register_model_loader(LOAD_FORMAT)(trainer_memory_loader())


def v0_engine() -> bool:
    """Whether the engine under construction is a V0 one (0.9 and 0.10 fall back to it; the variable is set then)."""
    from vllm import envs

    return not getattr(envs, "VLLM_USE_V1", True)


def refuse_overwriting(model: Any) -> None:
    """In 0.9 and 0.10.0 a second ``load_model`` of the worker reads the checkpoint into the model that is there.

    Raises:
        SharingError: that would overwrite a trainer's weights.
    """
    from rlpatch import phases

    for pair in phases.live():
        if pair.sharing is not None and pair.shares and pair.sharing.engine_model is model:
            raise SharingError(_OVERWRITES)


_OVERWRITES = (
    "reload_weights would overwrite the trainer's weights with the checkpoint's: this engine shares them. Load "
    "into the trainer's model instead, or apply(share_weights=False)"
)


class TrainerMemory:
    """What the constructor's adapter needs to know."""

    @staticmethod
    def engine_arguments(pair: Colocation) -> dict[str, Any]:
        """Arguments of ``LLM`` for an engine that is filled from the trainer's memory."""
        register_loader()
        return {"load_format": LOAD_FORMAT}


@contextlib.contextmanager
def outside_the_pool() -> Iterator[None]:
    """Leave vLLM's memory pool for a moment, if it is in use.

    Meanwhile torch gives nothing back to the device, whatever pool it is cached in: ``release_cached_blocks`` asks for
    ``captures_underway.empty()`` (c10/cuda/CUDACachingAllocator.cpp), and a pool in use counts as a capture. So
    ``empty_cache`` does nothing, and an allocation that fails does not try again without the cached blocks.
    """
    import torch
    from vllm.device_allocator.cumem import CuMemAllocator

    allocator = CuMemAllocator.instance
    entered = allocator.allocator_and_pools.get(allocator.current_tag) if allocator is not None else None
    begin, end = (
        _torch("beginAllocateCurrentThreadToPool", "beginAllocateToPool"),
        _torch("endAllocateToPool", "endAllocateCurrentStreamToPool"),
    )
    if not entered or begin is None or end is None:
        yield
        return
    pool = (entered[-1] if isinstance(entered, list) else entered)[0]  # a list from 0.33
    device = torch.cuda.current_device()
    end(device, pool.id)
    try:
        yield
    finally:
        begin(device, pool.id)
        torch.cuda.memory._cuda_releasePool(device, pool.id)  # the reference that `begin` took beside the first one's


def give_back(device: torch.device) -> None:
    """Where the trainer's weights were, nothing is left: give it to the device before something small settles there and
    keeps it (workspaces, the engine's buffers), for then torch no longer can."""
    from rlpatch.standby import make_room

    if device.type != "cpu":
        with outside_the_pool():
            make_room(device)


def _torch(*names: str) -> Any:
    """What ``torch.cuda.use_mem_pool`` calls, by its name since torch 2.8, or before; None: by neither."""
    import torch

    return next((f for name in names if (f := getattr(torch.cuda.memory, f"_cuda_{name}", None)) is not None), None)


# ---- guards ----------------------------------------------------------------------------------------------------------


def _pair(kind: str, owner: Any) -> Colocation | None:
    """The pair that `owner` (an engine, executor or worker) belongs to."""
    from rlpatch import phases

    pair: Colocation | None = getattr(phases, kind)(owner)
    return pair


def _sharing_pair(kind: str, owner: Any) -> Colocation | None:
    """The same, if it shares its weights."""
    pair = _pair(kind, owner)
    return pair if pair is not None and pair.shares else None


def _level(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    return int(kwargs.get("level", args[0] if args else 1))


def _sleep_guard(lowest: int) -> Wrapper:
    def sleep(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        pair, level = _pair("of_engine", instance), _level(args, kwargs)
        if pair is None or level < lowest:
            return wrapped(*args, **kwargs)
        if pair.shares:
            return pair.sleep()
        if level != 1:  # the LoRA slots lie in the same pool, and their memory is discarded
            pair.forget_slots()
        return wrapped(*args, **kwargs)

    return sleep


def _wake_up(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    pair = _sharing_pair("of_engine", instance)
    if pair is None:
        return wrapped(*args, **kwargs)
    tags = kwargs.get("tags", args[0] if args else None)
    if tags is None or "kv_cache" in tags:
        return pair.wake()
    return None if set(tags) <= {"weights"} else wrapped(*args, **kwargs)


def _executor_guard(lowest: int) -> Wrapper:
    def sleep(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _sharing_pair("of_executor", instance) is not None and _level(args, kwargs) >= lowest:
            raise SharingError(
                f"sleep level {_level(args, kwargs)} would take the trainer's own weights off the device: this engine "
                "shares them. Use LLM.sleep (rlpatch turns it into KV standby), or apply(share_weights=False)"
            )
        return wrapped(*args, **kwargs)

    return sleep


def _reload_weights(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if _sharing_pair("of_worker", instance) is not None:
        raise SharingError(_OVERWRITES)
    return wrapped(*args, **kwargs)


def sleep_guards(lowest: int) -> list[Patch]:
    """Level `lowest` and above touch weights: 1, and 0 before 0.17, where every level but 1 discards all memory."""
    return [
        Patch("vllm.entrypoints.llm", "LLM.sleep", _sleep_guard(lowest)),
        Patch("vllm.entrypoints.llm", "LLM.wake_up", _wake_up),
        Patch("vllm.v1.executor.abstract", "Executor.sleep", _executor_guard(lowest)),
    ]


RELOAD_GUARD = Patch("vllm.v1.worker.gpu_worker", "Worker.reload_weights", _reload_weights)


def has_registry() -> str | None:
    """The probe for releases with ``register_model_loader``."""
    import vllm.model_executor.model_loader as loaders

    return None if hasattr(loaders, "register_model_loader") else "vLLM has no register_model_loader"


RELIES = (
    Relies(
        "vllm.model_executor.model_loader.base_loader:BaseModelLoader.load_model",
        contains=(
            "self.load_weights(model, model_config)",
            "process_weights_after_loading(model, model_config, target_device)",
        ),
    ),
    Relies("vllm.model_executor.model_loader.base_loader:BaseModelLoader.download_model"),
    Relies("vllm.model_executor.model_loader.base_loader:BaseModelLoader.load_config"),
    Relies(
        "vllm.model_executor.model_loader.base_loader:BaseModelLoader.load_weights",
        positional=("model", "model_config"),
    ),
    Relies(
        "vllm.model_executor.model_loader.default_loader:DefaultModelLoader.load_weights",
        positional=("model", "model_config"),
    ),
    Relies("vllm.config:LoadConfig.load_format"),
    Relies("vllm.engine.arg_utils:EngineArgs.load_format"),
    # outside_the_pool
    Relies("vllm.device_allocator.cumem:CuMemAllocator.instance"),
    Relies("vllm.device_allocator.cumem:CuMemAllocator.current_tag"),
    Relies(
        "vllm.device_allocator.cumem:CuMemAllocator.use_memory_pool",
        contains=("self.current_tag = tag", "self.allocator_and_pools"),
    ),
    # sharing.trace: loaders end in copy_ from the tensor that they were given
    Relies(
        "vllm.model_executor.model_loader.weight_utils:default_weight_loader",
        contains=("param.data.copy_(loaded_weight)",),
    ),
    Relies(
        "vllm.model_executor.parameter:BasevLLMParameter._assert_and_load",
        contains=("self.data.copy_(loaded_weight)",),
    ),
    Relies("vllm.entrypoints.llm:LLM.sleep", positional=("level",)),
    Relies("vllm.entrypoints.llm:LLM.wake_up", positional=("tags",)),
    Relies("vllm.v1.executor.abstract:Executor.sleep", positional=("level",)),
)
