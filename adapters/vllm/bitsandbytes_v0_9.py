"""4-bit weights shared with the vLLM releases that have bitsandbytes in tree (0.9.2 to 0.27.1).

``BitsAndBytesModelLoader.load_weights`` (vllm/model_executor/model_loader/bitsandbytes_loader.py) is wrapped; see
``_bitsandbytes.py`` for the call it replaces. In 0.9.2 stacking, binding and dequantizing stand in ``load_weights``
itself, from 0.10.0 on in methods of their own; after that the file changed in names only (FusedMoE became RoutedExperts).
The parameters (``uint8 [n, 1]`` with ``pack_factor``), ``bnb_quant_state``, ``bnb_shard_offsets`` and
``_apply_4bit_weight`` are the same throughout.
Delete when: the oldest supported vLLM is 0.28, which moved bitsandbytes into a plugin
(https://github.com/vllm-project/vllm/pull/43529).
"""

from __future__ import annotations

from rlpatch.adapters.vllm._bitsandbytes import IN_TREE, QuantizedWeights, has, loader_patches, no_bitsandbytes
from rlpatch.registry import Adapter
from rlpatch.relies import Relies

_LAYERS = "vllm.model_executor.layers.quantization.bitsandbytes"


def _probe() -> str | None:
    return None if has(IN_TREE) else f"there is no {IN_TREE}"


ADAPTER = Adapter(
    capability="quantized_weights",
    library="vllm",
    versions=">=0.9.2,<0.28",
    module="vllm.entrypoints.llm",
    probe=_probe,
    relevant=no_bitsandbytes,
    provides=QuantizedWeights,
    patches=lambda context: loader_patches(IN_TREE),
    relies_on=(
        Relies(
            f"{IN_TREE}:BitsAndBytesModelLoader.load_weights",
            fingerprints=("feede0130e4d", "6ec933d5ca7c", "0971393c45e1"),
        ),
        Relies(
            f"{_LAYERS}:BitsAndBytesLinearMethod._apply_4bit_weight",
            contains=(
                "qweight.bnb_quant_state",
                "qweight.bnb_shard_offsets",
                "apply_bnb_4bit(bf_x, qweight, offsets, out)",
            ),
        ),
        Relies(f"{_LAYERS}:BitsAndBytesLinearMethod.create_weights", contains=("'pack_factor'", "torch.uint8")),
        Relies(
            "vllm.engine.arg_utils:EngineArgs.create_load_config", contains=("self.quantization == 'bitsandbytes'",)
        ),
    ),
)
