"""4-bit weights shared with the vLLM releases whose bitsandbytes is a plugin (0.28 and later).

vLLM 0.28.0 removed layers/quantization/bitsandbytes.py, model_loader/bitsandbytes_loader.py and the bitsandbytes branches
of layers/linear.py (https://github.com/vllm-project/vllm/pull/43529, RFC vllm#39583); ``pip install vllm-bnb-plugin``
brings them back through ``vllm.general_plugins``. Its loader is the same class in another module, its 4-bit parameter a
``PackedvLLMParameter`` that ends in the same ``copy_``; see ``_bitsandbytes.py``.
Without the plugin a 4-bit trainer has no engine: vLLM itself would say "Unknown quantization method: bitsandbytes".
Delete when: the plugin's loader takes weights from memory.
"""

from __future__ import annotations

from rlpatch.adapters.vllm._bitsandbytes import IN_TREE, PLUGIN, QuantizedWeights, has, loader_patches, no_bitsandbytes
from rlpatch.registry import Adapter
from rlpatch.relies import Relies


def _probe() -> str | None:
    return f"{IN_TREE} is still there" if has(IN_TREE) else None


def _relevant() -> str | None:
    if not has(PLUGIN):
        return (
            "this vLLM has no bitsandbytes of its own; pip install vllm-bnb-plugin, or use the last release that has it, "
            "0.27.1"
        )
    return no_bitsandbytes()


ADAPTER = Adapter(
    capability="quantized_weights",
    library="vllm",
    versions=">=0.28,<0.34",
    module="vllm.entrypoints.llm",
    probe=_probe,
    relevant=_relevant,
    provides=QuantizedWeights,
    patches=lambda context: loader_patches(PLUGIN),
    relies_on=(
        Relies(
            f"{PLUGIN}:BitsAndBytesModelLoader.load_weights"
        ),  # another distribution's: not checked with vLLM's releases
        Relies("vllm.plugins:load_general_plugins"),
        Relies("vllm.model_executor.model_loader:register_model_loader", positional=("load_format",)),
        Relies("vllm.model_executor.parameter:PackedvLLMParameter", parameters=("packed_factor", "packed_dim")),
        Relies("vllm.engine.arg_utils:EngineArgs", parameters=("quantization", "load_format")),
    ),
)
