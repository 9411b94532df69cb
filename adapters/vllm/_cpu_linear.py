"""Linear layers of the CPU backend on unpacked weights, shared by the CPU adapters."""

from __future__ import annotations

from typing import Any

from rlpatch.patching import Patch
from rlpatch.relies import Relies


def _dispatch(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    layer = kwargs["layer"] if "layer" in kwargs else args[0]
    if layer.weight.is_meta or layer.weight.ndim != 2:
        return wrapped(*args, **kwargs)
    import torch

    layer.cpu_linear = torch.nn.functional.linear
    return None


UNPACKED_LINEAR = Patch("vllm.model_executor.layers.utils", "dispatch_cpu_unquantized_gemm", _dispatch)

LINEAR = (
    Relies("vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm", positional=("layer", "remove_weight")),
    Relies("vllm.model_executor.layers.utils:cpu_unquantized_gemm", contains=("layer.cpu_linear(x, weight, bias)",)),
    Relies("vllm.platforms.interface:Platform.is_cpu"),
)
