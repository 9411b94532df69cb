"""LoRA slots where ``set_lora`` takes A and B transposed (0.9.2 to 0.10).

``LoRAModel.from_lora_tensors`` transposes what it reads (``A [in, r]``, ``B [r, out]``) and ``set_lora(index, lora_a,
lora_b, embeddings_tensor, bias)`` transposes it back while it copies, so that the buffers are those of later releases.
``LoRAConfig.__post_init__`` lists the accepted ranks.
Delete when: the oldest supported vLLM is 0.11.
"""

from __future__ import annotations

from rlpatch.adapters.vllm._lora_slots import RELIES, LoraSlots, probe
from rlpatch.registry import Adapter
from rlpatch.relies import Relies


class TransposedSlots(LoraSlots):
    """See `rlpatch.lora.slots.Mechanism`."""

    transposed = True
    ranks = (8, 16, 32, 64, 128, 256, 320, 512)


ADAPTER = Adapter(
    capability="lora_slots",
    library="vllm",
    versions=">=0.9.2,<0.11",
    module="vllm.entrypoints.llm",
    probe=lambda: probe(("embeddings_tensor", "bias"), transposed=True, ranks=False),
    provides=TransposedSlots,
    relies_on=(
        Relies(
            "vllm.lora.layers:BaseLayerWithLoRA.set_lora",
            positional=("index", "lora_a", "lora_b", "embeddings_tensor", "bias"),
        ),
        Relies(
            "vllm.lora.layers:ColumnParallelLinearWithLoRA.set_lora",
            contains=("lora_a.T", "lora_b.T"),
        ),
        *RELIES,
    ),
)
