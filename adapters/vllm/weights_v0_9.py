"""Weights from the trainer's memory before loaders can be registered (0.9.2 and 0.10.0).

``get_model_loader`` (model_executor/model_loader/__init__.py) takes a class as ``LoadConfig.load_format`` and calls it
with the config; ``LoadConfig`` declares ``Union[str, LoadFormat, "BaseModelLoader"]``, and ``EngineArgs`` hands the value
on. So the loader class itself is the load format, and nothing is registered or wrapped.
Sleep levels as in ``weights_v0_10.py``. ``Worker.reload_weights`` came with 0.10.0: it is refused where callers enter,
``LLM.collective_rpc``. 0.9.2 reloads by a second ``load_model`` of the worker, which the loader refuses.
These releases may fall back to their V0 engine, which is left alone.
Delete when: the oldest supported vLLM is 0.10.1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlpatch.adapters.vllm._weights import RELIES, refuse_overwriting, sleep_guards, trainer_memory_loader
from rlpatch.patching import Patch
from rlpatch.registry import Adapter, Context
from rlpatch.relies import Relies

if TYPE_CHECKING:
    from rlpatch.phases import Colocation


class TrainerMemory:
    """See `rlpatch.adapters.vllm._weights.TrainerMemory`."""

    @staticmethod
    def engine_arguments(pair: Colocation) -> dict[str, Any]:
        """Arguments of ``LLM`` for an engine that is filled from the trainer's memory."""
        return {"load_format": trainer_memory_loader()}


def _collective_rpc(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    from rlpatch import phases

    pair = phases.of_engine(instance)
    method = kwargs.get("method", args[0] if args else None)
    if pair is not None and pair.sharing is not None and method in ("reload_weights", "load_model"):
        refuse_overwriting(pair.sharing.engine_model)
    return wrapped(*args, **kwargs)


def _patches(context: Context) -> list[Patch]:
    return [*sleep_guards(lowest=0), Patch("vllm.entrypoints.llm", "LLM.collective_rpc", _collective_rpc)]


def _probe() -> str | None:
    import inspect

    import vllm.model_executor.model_loader as loaders

    if "isinstance(load_config.load_format, type)" not in inspect.getsource(loaders.get_model_loader):
        return "get_model_loader takes no class as load_format"
    return None


ADAPTER = Adapter(
    capability="share_weights",
    library="vllm",
    versions=">=0.9.2,<0.10.1",
    module="vllm.entrypoints.llm",
    probe=_probe,
    provides=TrainerMemory,
    patches=_patches,
    relies_on=(
        Relies(
            "vllm.model_executor.model_loader:get_model_loader",
            contains=("isinstance(load_config.load_format, type)",),
        ),
        *RELIES,
    ),
)
