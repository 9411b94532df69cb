"""LoRA slots where ``set_lora(index, lora_a, lora_b)`` takes matrices as PEFT stores them (0.12 and later).

See ``_lora_slots.py`` for the way of an adapter into its slot. ``lora/models.py`` became ``lora_model.py`` and
``model_manager.py`` in 0.13; ``lora/worker_manager.py`` imports the manager's class in every release.
Delete when: vLLM takes an adapter's tensors directly (a ``LoRARequest`` with tensors) and updates them in place.
"""

from __future__ import annotations

from rlpatch.adapters.vllm._lora_slots import RELIES, LoraSlots, probe
from rlpatch.registry import Adapter
from rlpatch.relies import Relies

ADAPTER = Adapter(
    capability="lora_slots",
    library="vllm",
    versions=">=0.12,<0.34",
    module="vllm.entrypoints.llm",
    probe=lambda: probe(()),
    provides=LoraSlots,
    relies_on=(
        Relies("vllm.config.lora:MaxLoRARanks"),
        Relies("vllm.lora.layers:BaseLayerWithLoRA.set_lora", positional=("index", "lora_a", "lora_b")),
        *RELIES,
    ),
)
