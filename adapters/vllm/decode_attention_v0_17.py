"""Attention of decode steps by a kernel for single queries (`rlpatch.decoding.attention`), on Hopper.

``FlashAttentionImpl.forward`` ends in ``flash_attn_varlen_func`` of its own module (from 0.30 by way of
``FA4DenseAttentionKernel``, whatever the version), with FlashAttention 3's arguments by name: queries, pages of keys and
values whatever their layout, the block table, lengths. Where every sequence has one query, none of FlashAttention's options
is in use, and there are enough sequences to fill the device, ours computes it; the cache has been written before.
Everything else stays FlashAttention's: prompts, few sequences, windows, ALiBi, sinks, soft caps, quantized caches,
cascades, decode context parallelism.

It is for decode steps that are CUDA graphs of their own (``cudagraph_mode`` FULL_AND_PIECEWISE, the default, or
FULL_DECODE_ONLY). A graph for batches of prompts and decodes together (FULL) may be captured with single queries and
replayed with longer ones; without graphs the host waits for the launches; dual batch overlap computes two batches at once.
Beside an engine with any of these FlashAttention's stays.

Which kernel is taken depends on sizes alone, so that a run is repeated bit for bit. Batch invariance asks for one whatever
the size: left alone.
Delete when: FlashAttention has a kernel for single queries that is as fast (Hopper, paged, 2 to 16 query heads a KV head).
"""

from __future__ import annotations

import logging
import weakref
from typing import Any, cast

from rlpatch.adapters.vllm._platform import no_triton_on_cuda
from rlpatch.patching import Patch
from rlpatch.registry import Adapter, Context
from rlpatch.relies import Relies

logger = logging.getLogger("rlpatch")

MODULE = "vllm.v1.attention.backends.flash_attn"
_VERSION = 3  # FlashAttention's, which Hopper alone has
_GROUP = 16  # query heads of a KV head, as many as a tile has rows
_READ = (
    "q", "k", "v", "out", "block_table", "seqused_k", "max_seqlen_q", "softmax_scale", "window_size", "softcap",
    "fa_version",
)  # fmt: skip
_IDLE = (  # say nothing about single queries in 16 bits
    "cu_seqlens_q", "max_seqlen_k", "causal", "scheduler_metadata", "num_splits", "q_descale", "k_descale", "v_descale",
)  # fmt: skip

_failed = False
_configs: list[weakref.ref[Any]] = []  # of engines with this backend


def _plain(call: dict[str, Any]) -> bool:
    """Whether this is nothing but single queries over 16-bit pages."""
    import torch

    from rlpatch.decoding.attention import HEADS

    tensors = [call.get(name) for name in _READ[:6]]
    if call.get("fa_version") != _VERSION or not all(isinstance(tensor, torch.Tensor) for tensor in tensors):
        return False
    query, keys, values, out, table, lengths = (cast(torch.Tensor, tensor) for tensor in tensors)
    others = (value for name, value in call.items() if name not in _READ and name not in _IDLE)
    if any(value is not None and value is not False for value in others):
        return False  # an option that is in use, or one that nobody here knows
    window = call.get("window_size")
    if call.get("softcap") or (window is not None and tuple(window) != (-1, -1)):
        return False
    if not query.shape[0] == lengths.shape[0] == table.shape[0] == out.shape[0]:
        return False  # a sequence without a query among them
    head = query.shape[-1]
    return (
        head in HEADS
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.dtype == keys.dtype == values.dtype == out.dtype
        and keys.ndim == 4
        and head == keys.shape[-1] == values.shape[-1]
        and query.shape[1] // keys.shape[2] <= _GROUP
        and all(tensor.stride(-1) == 1 for tensor in (query, keys, values, out, table, lengths))
    )


def _suitable() -> bool:
    """Whether decode steps, and nothing else, are replayed as graphs, one at a time, by every engine that was seen."""
    from vllm import envs
    from vllm.config import CUDAGraphMode

    def suits(config: Any) -> bool:
        mode = config.compilation_config.cudagraph_mode
        if mode is None or config.parallel_config.enable_dbo:
            return False
        return bool(mode.decode_mode() == CUDAGraphMode.FULL != mode.mixed_mode())

    configs = [config for ref in _configs if (config := ref()) is not None]
    return not getattr(envs, "VLLM_BATCH_INVARIANT", False) and bool(configs) and all(map(suits, configs))


def _decode(call: dict[str, Any]) -> bool:
    """Compute it, if it is ours."""
    from rlpatch.decoding.attention import attend, multiprocessors, plan

    if not _plain(call) or not _suitable():
        return False
    query, keys, table = call["q"], call["k"], call["block_table"]
    how = plan(
        query.shape[0], keys.shape[2], query.shape[2], table.shape[1] * keys.shape[1], multiprocessors(query.device)
    )
    scale = call.get("softmax_scale") or query.shape[2] ** -0.5
    return how is not None and attend(query, keys, call["v"], table, call["seqused_k"], scale, call["out"], how)


def _call(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    global _failed
    if kwargs.get("max_seqlen_q") == 1 and not args and not _failed:
        try:
            if _decode(kwargs):
                return kwargs["out"]
        except Exception as error:  # a compiler, say, that does not know this GPU
            _failed = True
            logger.warning("rlpatch: decode_attention: FlashAttention's kernel stays: %r", error)
    return wrapped(*args, **kwargs)


def _build(wrapped: Any, builder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    result = wrapped(*args, **kwargs)
    if not any(ref() is builder.vllm_config for ref in _configs):
        _configs[:] = [ref for ref in _configs if ref() is not None] + [weakref.ref(builder.vllm_config)]
    return result


def _relevant() -> str | None:
    from vllm.platforms import current_platform

    if (reason := no_triton_on_cuda()) is not None:
        return reason
    capability = current_platform.get_device_capability()
    if capability is None or capability.major != 9:
        return "the GPU is none of Hopper's, which FlashAttention 3 and the kernel in its place are for"
    return None


def _patches(context: Context) -> list[Patch]:
    return [
        Patch(MODULE, "flash_attn_varlen_func", _call),
        Patch(MODULE, "FlashAttentionMetadataBuilder.__init__", _build),
    ]


_FORWARD = "FlashAttentionImpl.forward"
_READS = (
    "query[:num_actual_tokens]",
    "output[:num_actual_tokens]",
    "attn_metadata.max_query_len",
    "attn_metadata.seq_lens",
    "attn_metadata.block_table",
    "self.scale",
    "self.alibi_slopes",
    "self.logits_soft_cap",
    "self.vllm_flash_attn_version",
    "self.sinks",
)
ADAPTER = Adapter(
    capability="decode_attention",
    library="vllm",
    versions=">=0.17,<0.34",
    module="vllm.entrypoints.llm",
    relevant=_relevant,
    patches=_patches,
    relies_on=(
        Relies(
            f"{MODULE}:{_FORWARD}",
            contains=("flash_attn_varlen_func", *_READS),
            otherwise=(Relies(f"{MODULE}:{_FORWARD}", contains=("_FA4_DENSE_ATTENTION_KERNEL", *_READS)),),
        ),
        Relies(
            f"{MODULE}:FA4DenseAttentionKernel.kernel",
            contains=("flash_attn_varlen_func(*args, **kwargs)",),
            versions=">=0.30",
        ),
        Relies(f"{MODULE}:FlashAttentionImpl.do_kv_cache_update", contains=("reshape_and_cache_flash",)),
        Relies(
            "vllm.vllm_flash_attn.flash_attn_interface:flash_attn_varlen_func",
            parameters=_READ + _IDLE,
        ),
        Relies("vllm.v1.attention.backend:AttentionMetadataBuilder.vllm_config"),
        Relies("vllm.config:VllmConfig.compilation_config"),
        Relies("vllm.config:ParallelConfig.enable_dbo"),
        Relies("vllm.config:CompilationConfig.cudagraph_mode"),
        Relies("vllm.config:CUDAGraphMode.decode_mode"),
        Relies("vllm.config:CUDAGraphMode.mixed_mode"),
        Relies("vllm.platforms.interface:Platform.get_device_capability"),
    ),
)
