"""KV standby stays off in vLLM 0.14: users report ``cudaErrorIllegalAddress`` when the KV cache is restored.

The sources give no cause (``Worker.sleep`` and the allocator are those of 0.15), so the report stands:
compat_matrix.yaml, ``vllm-014-standby``. Weights are shared all the same.
Delete when: the oldest supported vLLM is 0.15.
"""

from __future__ import annotations

from rlpatch.registry import Adapter

ADAPTER = Adapter(
    capability="standby",
    library="vllm",
    versions=">=0.14,<0.15",
    module="vllm.entrypoints.llm",
    broken="with vLLM 0.14 it ends in cudaErrorIllegalAddress (known bad: vllm-014-standby); use vLLM 0.15 or later to "
    "have it",
)
