"""LoRA slots where ``set_lora`` takes extra vocabulary as well (0.11).

``set_lora(index, lora_a, lora_b, embeddings_tensor[, bias])``, ``bias`` in 0.11.0 alone; both stay None: adapters with a
bias or new tokens are not served from slots. 0.11.0 lists the accepted ranks in ``LoRAConfig.__post_init__`` only; those
of 0.11.1 and 0.11.2 are the same and 1.
Delete when: the oldest supported vLLM is 0.12.
"""

from __future__ import annotations

from rlpatch.adapters.vllm._lora_slots import RELIES, LoraSlots, probe
from rlpatch.registry import Adapter
from rlpatch.relies import Relies


class SlotsWithVocabulary(LoraSlots):
    """See `rlpatch.lora.slots.Mechanism`."""

    ranks = (8, 16, 32, 64, 128, 256, 320, 512)


def _probe() -> str | None:
    misfits = [probe(extra, ranks=False) for extra in (("embeddings_tensor",), ("embeddings_tensor", "bias"))]
    return None if None in misfits else misfits[0]


ADAPTER = Adapter(
    capability="lora_slots",
    library="vllm",
    versions=">=0.11,<0.12",
    module="vllm.entrypoints.llm",
    probe=_probe,
    provides=SlotsWithVocabulary,
    relies_on=(
        Relies(
            "vllm.lora.layers:BaseLayerWithLoRA.set_lora", positional=("index", "lora_a", "lora_b", "embeddings_tensor")
        ),
        *RELIES,
    ),
)
