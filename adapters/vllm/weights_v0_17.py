"""Weights from the trainer's memory, and nothing upstream that would overwrite or unmap them (0.17 and later).

Filling: ``@register_model_loader`` (official since 0.10.1) registers a loader whose ``load_weights`` feeds the trainer's
tensors to the model's own ``load_weights``; ``BaseModelLoader.load_model`` does the rest as for any other load format.
Guards, for engines whose weights are shared: ``LLM.sleep`` level 1 would offload and level 2 discard the trainer's
weights: it becomes KV standby; ``Executor.sleep`` refuses whoever comes past that; ``Worker.reload_weights`` reads the
checkpoint from disk over the trainer's weights (https://github.com/vllm-project/vllm/issues/29341) and is refused.
Delete when: vLLM can be handed externally owned weights (``get_external_weight_memory``, 0.32, only counts them).
"""

from __future__ import annotations

from rlpatch.adapters.vllm._weights import RELIES, RELOAD_GUARD, TrainerMemory, has_registry, sleep_guards
from rlpatch.patching import Patch
from rlpatch.registry import Adapter, Context
from rlpatch.relies import Relies


def _patches(context: Context) -> list[Patch]:
    return [*sleep_guards(lowest=1), RELOAD_GUARD]


def _probe() -> str | None:
    import inspect

    from vllm.entrypoints.llm import LLM

    if "mode" not in inspect.signature(LLM.sleep).parameters:
        return "LLM.sleep has no level 0 that keeps everything"
    return has_registry()


ADAPTER = Adapter(
    capability="share_weights",
    library="vllm",
    versions=">=0.17,<0.34",
    module="vllm.entrypoints.llm",
    probe=_probe,
    provides=TrainerMemory,
    patches=_patches,
    relies_on=(
        Relies("vllm.model_executor.model_loader:register_model_loader", positional=("load_format",)),
        *RELIES,
    ),
)
