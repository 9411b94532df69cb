"""CPU backend before 0.10.2: linear layers are packed under ``VLLM_CPU_SGL_KERNEL=1`` alone, which is off by default.

Delete when: the oldest supported CPU release is 0.10.2.
"""

from __future__ import annotations

from rlpatch.adapters.vllm._platform import only_on_cpu
from rlpatch.registry import Adapter


def _probe() -> str | None:
    import os

    from vllm.model_executor.layers import utils

    if hasattr(utils, "dispatch_cpu_unquantized_gemm"):
        return "it packs every linear layer"
    packs = os.environ.get("VLLM_CPU_SGL_KERNEL", "0") not in ("", "0")
    return "VLLM_CPU_SGL_KERNEL=1 packs weights; unset it" if packs else None


ADAPTER = Adapter(
    capability="cpu_weights",
    library="vllm",
    versions=">=0.9,<0.10.2",
    module="vllm.entrypoints.llm",
    probe=_probe,
    relevant=only_on_cpu,
    native=True,
)
