"""CPU backend: keep weights as they were loaded, so that a later write reaches the kernels.

``dispatch_cpu_unquantized_gemm(layer, remove_weight)`` (model_executor/layers/utils.py) packs each weight for its GEMM
and leaves an empty Parameter, whose missing ``weight_loader`` breaks even TRL's own sync (``'Parameter' object has no
attribute 'weight_loader'``), and a stale packed copy behind ``lm_head``. Here ``layer.cpu_linear`` becomes plain
``torch.nn.functional.linear`` on the live weight. Experts: ``UnquantizedFusedMoEMethod.process_weights_after_loading``
packs for the SGL kernel (in place!) or through ``CPUFusedMOE``; here the SGL path is declined and ``CPUFusedMOE`` keeps
the unpacked layout and computes in plain torch. On AMX machines ``check_grouped_gemm`` refuses fp32 altogether.
Delete when: the oldest supported CPU release is 0.28.
"""

from __future__ import annotations

from typing import Any

from rlpatch.adapters.vllm._cpu_linear import LINEAR, UNPACKED_LINEAR
from rlpatch.adapters.vllm._platform import has, only_on_cpu
from rlpatch.patching import Patch
from rlpatch.registry import Adapter, Context
from rlpatch.relies import Relies

_EXPERTS = "vllm.model_executor.layers.fused_moe.cpu_fused_moe"


def _nothing(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    return None


def _patches(context: Context) -> list[Patch]:
    from rlpatch.adapters.vllm._plain_experts import plain_experts

    return [
        UNPACKED_LINEAR,
        Patch(
            "vllm.model_executor.layers.utils", "check_cpu_sgl_kernel", lambda wrapped, instance, args, kwargs: False
        ),
        Patch(_EXPERTS, "CPUFusedMOE._pad_moe_intermediate_for_grouped_gemm", _nothing),
        Patch(_EXPERTS, "CPUFusedMOE.check_grouped_gemm", lambda wrapped, instance, args, kwargs: (True, "plain")),
        Patch(_EXPERTS, "CPUFusedMOE.init_moe_grouped_gemm", _nothing),
        Patch(_EXPERTS, "cpu_fused_moe", lambda wrapped, instance, args, kwargs: plain_experts(*args, **kwargs)),
    ]


def _probe() -> str | None:
    return None if has(_EXPERTS) else f"{_EXPERTS} is gone (experts moved)"


ADAPTER = Adapter(
    capability="cpu_weights",
    library="vllm",
    versions=">=0.27,<0.28",
    module="vllm.entrypoints.llm",
    probe=_probe,
    relevant=only_on_cpu,
    patches=_patches,
    relies_on=(
        *LINEAR,
        Relies(
            f"{_EXPERTS}:cpu_fused_moe",
            positional=(
                "input", "w13", "w2", "w13_bias", "w2_bias", "topk_weights", "topk_ids", "act", "isa", "skip_weighted",
            ),
        ),
        Relies(f"{_EXPERTS}:CPUFusedMOE.check_grouped_gemm", fingerprints=("fae3591486e5",)),
        Relies(f"{_EXPERTS}:CPUFusedMOE.init_moe_grouped_gemm", fingerprints=("8050c49b8cf1",)),
    ),
)  # fmt: skip
