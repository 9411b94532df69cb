"""KV standby stays off in vLLM 0.10: users report ``std::bad_alloc`` when the KV cache is released and restored.

The sources give no cause (the allocator's Python is that of 0.9.2 up to 0.10.1), so the report stands:
compat_matrix.yaml, ``vllm-010-standby``. Weights are shared all the same.
Delete when: the oldest supported vLLM is 0.11.
"""

from __future__ import annotations

from rlpatch.registry import Adapter

ADAPTER = Adapter(
    capability="standby",
    library="vllm",
    versions=">=0.10,<0.11",
    module="vllm.entrypoints.llm",
    broken="with vLLM 0.10 it ends in std::bad_alloc (known bad: vllm-010-standby); use vLLM 0.11 or later to have it",
)
