"""Weights from the trainer's memory, and nothing upstream that would overwrite or unmap them.

Filling: ``@register_model_loader`` (official since 0.10.2) registers a loader whose ``load_weights`` feeds the trainer's
tensors to the model's own ``load_weights``; ``BaseModelLoader.load_model`` does the rest as for any other load format.
Guards, for engines whose weights are shared: ``LLM.sleep`` level 1 would offload and level 2 discard the trainer's
weights: it becomes KV standby; ``Executor.sleep`` refuses whoever comes past that; ``Worker.reload_weights`` reads the
checkpoint from disk over the trainer's weights (https://github.com/vllm-project/vllm/issues/29341) and is refused.
Delete when: vLLM can be handed externally owned weights (``get_external_weight_memory``, 0.32, only counts them).
"""

from __future__ import annotations

import dataclasses
import logging
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from rlpatch.errors import SharingError
from rlpatch.patching import Patch
from rlpatch.registry import Adapter, Context

if TYPE_CHECKING:
    from rlpatch.phases import Colocation

logger = logging.getLogger("rlpatch")

LOAD_FORMAT = "rlpatch"


@lru_cache(maxsize=1)
def _register() -> None:
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    from rlpatch import phases
    from rlpatch.sharing.trace import WriteGuard, storage_key

    class TrainerMemoryLoader(BaseModelLoader):
        """Fill the engine from the trainer whose engine is being built; anything else loads from disk as usual."""

        def download_model(self, model_config: Any) -> None:
            """Nothing to download: the weights are in this process."""

        def _from_disk(self, model: Any, model_config: Any) -> None:
            config = dataclasses.replace(self.load_config, load_format="auto")
            DefaultModelLoader(config).load_weights(model, model_config)

        def load_weights(self, model: Any, model_config: Any) -> None:
            pair = phases.building()
            sharing = pair.loading() if pair is not None and pair.sharing is None else None
            if pair is None or sharing is None:  # e.g. a draft model loaded beside the policy
                self._from_disk(model, model_config)
                return
            try:
                sharing.fill(model, model.load_weights)
                missing = [n for n, p in model.named_parameters() if storage_key(p) not in sharing.written]
                if missing:
                    logger.info("rlpatch: the trainer has no %s; loading it from disk", ", ".join(missing))
                    with WriteGuard(sharing.written):
                        self._from_disk(model, model_config)
            except SharingError as error:
                pair.refuse(str(error))
                self._from_disk(model, model_config)

    register_model_loader(LOAD_FORMAT)(TrainerMemoryLoader)


class TrainerMemory:
    """What the constructor's adapter needs to know."""

    @staticmethod
    def engine_arguments(pair: Colocation) -> dict[str, Any]:
        """Arguments of ``LLM`` for an engine that is filled from the trainer's memory."""
        _register()
        return {"load_format": LOAD_FORMAT}


def _sharing_pair(kind: str, owner: Any) -> Colocation | None:
    """The pair that `owner` (an engine, executor or worker) belongs to, if it shares its weights."""
    from rlpatch import phases

    pair: Colocation | None = getattr(phases, kind)(owner)
    return pair if pair is not None and pair.shares else None


def _level(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    return int(kwargs.get("level", args[0] if args else 1))


def _sleep(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    pair = _sharing_pair("of_engine", instance)
    if pair is None or _level(args, kwargs) < 1:
        return wrapped(*args, **kwargs)
    return pair.sleep()


def _wake_up(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    pair = _sharing_pair("of_engine", instance)
    if pair is None:
        return wrapped(*args, **kwargs)
    tags = kwargs.get("tags", args[0] if args else None)
    if tags is None or "kv_cache" in tags:
        return pair.wake()
    return None if set(tags) <= {"weights"} else wrapped(*args, **kwargs)


def _executor_sleep(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if _sharing_pair("of_executor", instance) is not None and _level(args, kwargs) >= 1:
        raise SharingError(
            f"sleep level {_level(args, kwargs)} would take the trainer's own weights off the device: this engine shares "
            "them. Use LLM.sleep (rlpatch turns it into KV standby), or apply(share_weights=False)"
        )
    return wrapped(*args, **kwargs)


def _reload_weights(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if _sharing_pair("of_worker", instance) is not None:
        raise SharingError(
            "reload_weights would overwrite the trainer's weights with the checkpoint's: this engine shares them. Load "
            "into the trainer's model instead, or apply(share_weights=False)"
        )
    return wrapped(*args, **kwargs)


def _patches(context: Context) -> list[Patch]:
    return [
        Patch("vllm.entrypoints.llm", "LLM.sleep", _sleep),
        Patch("vllm.entrypoints.llm", "LLM.wake_up", _wake_up),
        Patch("vllm.v1.executor.abstract", "Executor.sleep", _executor_sleep),
        Patch("vllm.v1.worker.gpu_worker", "Worker.reload_weights", _reload_weights),
    ]


def _probe() -> str | None:
    import vllm.model_executor.model_loader as loaders

    return None if hasattr(loaders, "register_model_loader") else "vLLM has no register_model_loader"


ADAPTER = Adapter(
    capability="share_weights",
    library="vllm",
    versions=">=0.17,<0.34",
    module="vllm.entrypoints.llm",
    probe=_probe,
    provides=TrainerMemory,
    patches=_patches,
)
