"""CPU backend, [0.10.2, 0.27): linear layers keep their weights as they were loaded; experts are left alone.

From there ``dispatch_cpu_unquantized_gemm`` packs a weight for oneDNN and leaves an empty Parameter behind, as told in
`cpu_weights_v0_27`. Packed experts are not undone: what of a model with experts can be shared is for the probe of
`rlpatch.sharing` to find out.
Delete when: the oldest supported CPU release is 0.27.
"""

from __future__ import annotations

from rlpatch.adapters.vllm._cpu_linear import LINEAR, UNPACKED_LINEAR
from rlpatch.adapters.vllm._platform import only_on_cpu
from rlpatch.patching import Patch
from rlpatch.registry import Adapter, Context


def _patches(context: Context) -> list[Patch]:
    return [UNPACKED_LINEAR]


def _probe() -> str | None:
    from vllm.model_executor.layers import utils

    return None if hasattr(utils, "dispatch_cpu_unquantized_gemm") else "it has no dispatch_cpu_unquantized_gemm"


ADAPTER = Adapter(
    capability="cpu_weights",
    library="vllm",
    versions=">=0.10.2,<0.27",
    module="vllm.entrypoints.llm",
    probe=_probe,
    relevant=only_on_cpu,
    patches=_patches,
    relies_on=LINEAR,
)
