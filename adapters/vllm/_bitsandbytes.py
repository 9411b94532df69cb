"""4-bit weights from the trainer's memory, for vLLM's bitsandbytes loader wherever it lives.

``EngineArgs.create_load_config`` (engine/arg_utils.py; since 0.28 the plugin's own wrapper around
``create_engine_config``) sets ``load_format = "bitsandbytes"`` whenever ``quantization == "bitsandbytes"``, which TRL
passes when it sees a ``Linear4bit``. A load format of our own cannot stay beside that, and registering another loader as
"bitsandbytes" would swap a global for every engine in the process. So the official loader's ``load_weights`` is wrapped,
and acts only while a pair is being built whose trainer is quantized.

What upstream does there (model_loader/bitsandbytes_loader.py): reads the checkpoint, quantizes each matrix with
``quantize_4bit`` (nf4, double quantization, whatever the trainer chose), feeds the bytes to the model's ``load_weights``,
then ``_stack_quantization_states`` and ``_bind_quant_states_to_params`` set ``bnb_quant_state`` and
``bnb_shard_offsets`` on each parameter, and ``_dequantize_dq`` turns nested states into fp32 ``absmax``. All of that is
replaced by the trainer's bytes and states. ``apply`` reads nothing else: per position i of the fused weight it calls
``matmul_4bit(x, weight[offsets[i]:offsets[i + 1]].t(), states[i])``. lm_head, embeddings and norms are in 16 bits on both
sides and go the usual way. vLLM wraps modules for LoRA after this loader has run.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from rlpatch.adapters.vllm._platform import has as has
from rlpatch.errors import SharingError
from rlpatch.patching import Patch

if TYPE_CHECKING:
    import torch

    from rlpatch.phases import Colocation
    from rlpatch.sharing.quantized import QuantizedSharing

logger = logging.getLogger("rlpatch")

IN_TREE = "vllm.model_executor.model_loader.bitsandbytes_loader"
PLUGIN = "vllm_bnb_plugin.bitsandbytes_loader"


def flat_absmax(state: Any) -> torch.Tensor:
    """Of a nested ``QuantState``: ``float32 [blocks]``, by the operations that bitsandbytes' ``dequantize_4bit`` uses."""
    functional = importlib.import_module("bitsandbytes.functional")
    absmax: torch.Tensor = functional.dequantize_blockwise(state.absmax, state.state2)
    absmax += state.offset
    return absmax.float()


class QuantizedWeights:
    """What a trainer's adapter needs to know."""

    @staticmethod
    def refusal(model: torch.nn.Module) -> str | None:
        """Why this trainer's quantized weights cannot be shared, or None; names the setting and the remedy."""
        from rlpatch.sharing import quantized

        return quantized.refusal(model.named_parameters())


def _begin(pair: Colocation | None) -> QuantizedSharing | None:
    """The sharing to fill the engine with, or None to load as usual (no pair, or a second model beside the policy)."""
    from rlpatch.sharing import quantized

    if pair is None or pair.sharing is not None:
        return None
    usual = pair.loading()
    if usual is None:
        return None
    if isinstance(usual, quantized.QuantizedSharing):
        return usual
    sharing = quantized.QuantizedSharing(usual.slots, usual.renamer, flat_absmax)
    pair.sharing = sharing
    return sharing


def _load_weights(wrapped: Any, loader: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    from rlpatch import phases
    from rlpatch.sharing.trace import WriteGuard, storage_key

    pair = phases.building()
    sharing = _begin(pair)
    if pair is None or sharing is None:
        return wrapped(*args, **kwargs)
    model = kwargs["model"] if "model" in kwargs else args[0]
    try:
        sharing.fill(model, model.load_weights)
        missing = [name for name, p in model.named_parameters() if storage_key(p) not in sharing.written]
        if missing:
            logger.info("rlpatch: the trainer has no %s; loading it from disk", ", ".join(missing))
            with WriteGuard(sharing.written):
                wrapped(*args, **kwargs)
        sharing.bind()
    except SharingError as error:
        pair.refuse(str(error))
        logger.warning("rlpatch: the engine quantizes the checkpoint itself: %s", error)
        return wrapped(*args, **kwargs)
    return None


def loader_patches(module: str) -> list[Patch]:
    """The patches for the loader that lives in `module`."""
    return [Patch(module, "BitsAndBytesModelLoader.load_weights", _load_weights)]


def no_bitsandbytes() -> str | None:
    """The reason to skip when bitsandbytes itself is not installed: nothing can be quantized with it then."""
    return None if has("bitsandbytes") else "bitsandbytes is not installed"
