"""CPU backend: keep weights as they were loaded, so that a later write reaches the kernels (0.28 and later).

As in 0.27 (see cpu_weights_v0_27) for linear layers. Experts moved to ``experts/cpu_moe.py``:
``CPUUnquantizedExperts.process_weights_after_loading`` pads and prepacks ``w13_weight`` and ``w2_weight`` (and, in 0.28,
notes the layer's routing, so it must run), and ``apply`` hands them to the module's ``cpu_fused_moe``. Here packing and
padding give back what they got, and that function computes in plain torch. In 0.28 it returns its result; from 0.30 on
it writes to ``out``, its first argument.
Delete when: vLLM's CPU backend can be told not to prepack.
"""

from __future__ import annotations

from typing import Any

from rlpatch.adapters.vllm._cpu_linear import LINEAR, UNPACKED_LINEAR
from rlpatch.adapters.vllm._platform import has, only_on_cpu
from rlpatch.patching import Patch
from rlpatch.registry import Adapter, Context
from rlpatch.relies import Relies

_EXPERTS = "vllm.model_executor.layers.fused_moe.experts.cpu_moe"

_FUSED = (
    "out", "input", "w13", "w2", "w13_bias", "w2_bias", "topk_weights", "topk_ids", "act", "isa", "skip_weighted",
)  # fmt: skip


def _fused(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    import inspect

    from rlpatch.adapters.vllm._plain_experts import plain_experts

    call = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    out = call.pop("out", None)
    result = plain_experts(*call.values())
    if out is None:
        return result
    out.copy_(result)
    return None


def _replace(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    layer, name, new = args[:3]
    if getattr(layer, name) is new:  # a fresh Parameter would lose weight_loader and its other attributes
        return None
    return wrapped(*args, **kwargs)


def _patches(context: Context) -> list[Patch]:
    return [
        UNPACKED_LINEAR,
        Patch(_EXPERTS, "CPUUnquantizedExperts._pad_moe_intermediate", lambda wrapped, instance, args, kwargs: None),
        Patch(_EXPERTS, "cpu_prepack_moe_weight", lambda wrapped, instance, args, kwargs: args[0]),
        Patch(_EXPERTS, "replace_parameter", _replace),
        Patch(_EXPERTS, "cpu_fused_moe", _fused),
    ]


def _probe() -> str | None:
    return None if has(_EXPERTS) else f"{_EXPERTS} is missing"


ADAPTER = Adapter(
    capability="cpu_weights",
    library="vllm",
    versions=">=0.28,<0.33",
    module="vllm.entrypoints.llm",
    probe=_probe,
    relevant=only_on_cpu,
    patches=_patches,
    relies_on=(
        *LINEAR,
        Relies(
            f"{_EXPERTS}:cpu_fused_moe",
            positional=_FUSED[1:],
            otherwise=(Relies(f"{_EXPERTS}:cpu_fused_moe", positional=_FUSED),),
        ),
        Relies(f"{_EXPERTS}:cpu_prepack_moe_weight", positional=("weight", "isa")),
        Relies(f"{_EXPERTS}:replace_parameter", positional=("layer", "param_name", "new_tensor")),
        Relies(
            f"{_EXPERTS}:CPUUnquantizedExperts.process_weights_after_loading",
            fingerprints=("f909105e1778", "a3b6a02fd4ce"),
        ),
        Relies(f"{_EXPERTS}:CPUUnquantizedExperts.apply", fingerprints=("3401c4cb5fbb", "a3c4eecd260b")),
    ),
)
