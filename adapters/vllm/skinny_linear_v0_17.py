"""Linear layers of decode steps by the fastest kernel for so few rows (`rlpatch.decoding.linear`).

``UnquantizedLinearMethod`` ends in ``torch.nn.functional.linear``, cuBLAS's choice of kernel. Where a pair's engine has
loaded its weights, each layer with it gets a subclass in its place that calls ``torch.ops.rlpatch.skinny_linear``: the
way in which vLLM puts its own low-latency kernels under single models
(``vllm/models/qwen4_exp/nvidia/low_latency_gemm.py``, 0.33). Layers with any other method, quantized ones among them,
stay. So does the head: it is computed outside of the CUDA graphs, where the launch costs the host more than the kernel
saves the device (docs/steps.md).

What is compiled then calls an operator that other processes do not have, so the compile cache must tell the two apart:
``additional_config``, which vLLM hashes (``VllmConfig.compute_hash``), says that it is there.

An eager engine would wait for the launches instead, and batch invariance asks for kernels of its own: both left alone.
Delete when: vLLM has fast kernels for few rows under every model.
"""

from __future__ import annotations

import copy
import logging
from functools import lru_cache
from typing import Any

from rlpatch.adapters.vllm._platform import no_triton_on_cuda
from rlpatch.patching import Patch
from rlpatch.registry import Adapter, Context
from rlpatch.relies import Relies

logger = logging.getLogger("rlpatch")

MARK = "rlpatch_skinny_linear"
_OLDEST = 80  # compute capability; before Ampere a GPU copies nothing ahead of its use, and none was tried


@lru_cache(maxsize=1)
def method() -> type:
    """Ours, in place of vLLM's."""
    import torch
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    class SkinnyLinearMethod(UnquantizedLinearMethod):  # type: ignore[misc]
        def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
            return torch.ops.rlpatch.skinny_linear(x, layer.weight, bias)  # type: ignore[no-any-return]

    return SkinnyLinearMethod


def install(model: Any) -> list[Any]:
    """Give every plain linear layer of `model` our method; returns their weights, each once."""
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
    from vllm.model_executor.layers.utils import default_unquantized_gemm

    from rlpatch.decoding.linear import register, usable

    register()
    weights = {}
    for layer in model.modules():
        theirs = getattr(layer, "quant_method", None)
        if not isinstance(layer, LinearBase) or type(theirs) is not UnquantizedLinearMethod or not usable(layer.weight):
            continue
        if getattr(theirs, "_gemm_impl", default_unquantized_gemm) is not default_unquantized_gemm:
            continue  # kernel_config.linear_backend, from 0.31
        layer.quant_method = copy.copy(theirs)
        layer.quant_method.__class__ = method()
        weights[layer.weight.data_ptr()] = layer.weight.data
    return list(weights.values())


def _init(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    from vllm import envs

    from rlpatch import phases

    pair = phases.building()
    given = kwargs.get("additional_config") or {}
    compiled = not (kwargs.get("enforce_eager") or getattr(envs, "VLLM_BATCH_INVARIANT", False))
    if pair is not None and pair.engine is None and compiled and isinstance(given, dict):
        kwargs["additional_config"] = {**given, MARK: True}
    return wrapped(*args, **kwargs)


def _load_model(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    from rlpatch import phases
    from rlpatch.decoding.linear import CHOICES

    result = wrapped(*args, **kwargs)
    pair = phases.building()
    config = instance.vllm_config
    marked = isinstance(config.additional_config, dict) and MARK in config.additional_config
    if pair is not None and marked and not config.model_config.enforce_eager:
        try:
            weights = install(instance.model_runner.get_model())
            pair.skinny = CHOICES.tune(weights, config.scheduler_config.max_num_seqs)
        except Exception as error:  # the engine can do without: whatever has no tile is cuBLAS's
            logger.warning("rlpatch: skinny_linear: not timed, cuBLAS's kernels stay: %r", error)
    return result


def _relevant() -> str | None:
    from vllm.platforms import current_platform

    if (reason := no_triton_on_cuda()) is not None:
        return reason
    if not current_platform.has_device_capability(_OLDEST):
        return f"the GPU's compute capability is below {_OLDEST / 10}"
    return None


def _patches(context: Context) -> list[Patch]:
    return [
        Patch("vllm.entrypoints.llm", "LLM.__init__", _init),
        Patch("vllm.v1.worker.gpu_worker", "Worker.load_model", _load_model),
    ]


_APPLY = ("layer", "x", "bias")
ADAPTER = Adapter(
    capability="skinny_linear",
    library="vllm",
    versions=">=0.17,<0.34",
    module="vllm.entrypoints.llm",
    relevant=_relevant,
    patches=_patches,
    relies_on=(
        Relies(
            "vllm.model_executor.layers.linear:UnquantizedLinearMethod.apply",
            positional=_APPLY,
            contains=("dispatch_unquantized_gemm()(layer, x, layer.weight, bias)",),
            otherwise=(
                Relies(
                    "vllm.model_executor.layers.linear:UnquantizedLinearMethod.apply",
                    positional=_APPLY,
                    contains=("self._gemm_impl(layer, x, layer.weight, bias)",),
                ),
            ),
        ),
        Relies("vllm.model_executor.layers.linear:LinearBase"),
        Relies(
            "vllm.model_executor.layers.utils:default_unquantized_gemm",
            positional=("layer", "x", "weight", "bias"),
            contains=("torch.nn.functional.linear(x, weight, bias)",),
        ),
        Relies("vllm.engine.arg_utils:EngineArgs.additional_config"),
        Relies("vllm.config:VllmConfig.compute_hash", contains=("self.additional_config",)),
        Relies("vllm.v1.worker.gpu_worker:Worker.load_model"),
        Relies("vllm.config:SchedulerConfig.max_num_seqs"),
        Relies("vllm.config:ModelConfig.enforce_eager"),
        Relies("vllm.platforms.interface:Platform.has_device_capability"),
    ),
)
