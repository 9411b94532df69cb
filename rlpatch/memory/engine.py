"""What vLLM holds beside weights and KV cache, and how it counts, in bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rlpatch.errors import UsageError
from rlpatch.memory.model import FAMILIES, LINEAR, ModelShape, dtype_name, positive, width
from rlpatch.memory.sizes import MIB

_VOCAB_PAD = 64  # vllm/model_executor/layers/vocab_parallel_embedding.py DEFAULT_VOCAB_PADDING_SIZE
_SAMPLER = 22  # bytes per logit of a sampled row: bf16 and float32 logits, sorted values and indices, probabilities
_PIECE = MIB // 4  # of a captured layer and size, graph pool included; see docs/memory.md
_FULL_GRAPH = 2 * MIB  # of a whole-model graph
_LARGEST_BLOCK = 256  # tokens; vLLM chooses 16 on CUDA, 128 on CPU, 64 or more for some attention backends
CONTEXT = 640 * MIB  # CUDA context and loaded kernels of a process


@dataclass(frozen=True)
class Engine:
    """How vLLM is set up.

    Attributes:
        dtype: Of its weights.
        kv_dtype: Of the KV cache; ``"auto"``: `dtype`.
        block_size: Tokens of a KV block, as the plan counts.
        told_block_size: vLLM is told `block_size`; else it chooses its own.
        max_num_seqs: Sequences decoded at once (TRL: batch × steps per generation).
        max_num_batched_tokens: Tokens of one forward pass (TRL: 4096).
        max_model_len: Longest sequence; None: what training asks for.
        longest: Longest sequence that vLLM accepts, where it is not told `max_model_len`.
        eager: No CUDA graphs.
        graph_ceiling: Largest batch that is captured (vLLM: 512, on data-centre Blackwell 1024).
        lora_slots: LoRAs in vLLM's own buffers; 0: none (the fold needs none).
        lora_rank: ``max_lora_rank`` of these.
        shares: Trainer and engine hold one copy of the weights.
        watermark: Share of the KV blocks that vLLM keeps from sequences it admits (0.24 and later; default 0).
        unbounded: Why it cannot be told how much of a KV cache rollouts can fill; empty: it can.
        counts_weights: vLLM counts its weights against its utilization. Shared ones it does not see: what it allocates,
            the trainer frees, and it looks at the difference.
        counts_graphs: Its profiling estimates CUDA graphs (``VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS``, on since 0.20.2).
        workspace: cuBLAS and attention workspaces, sampler and input buffers, in bytes (FlashInfer's is 394 MiB more).
        context: CUDA context and loaded kernels of the process, in bytes.
        nccl: Of NCCL, where there is more than one process.
    """

    dtype: str = "bfloat16"
    kv_dtype: str = "auto"
    block_size: int = 16
    told_block_size: bool = False
    max_num_seqs: int = 8
    max_num_batched_tokens: int = 4096
    max_model_len: int | None = None
    longest: int | None = None
    eager: bool = False
    graph_ceiling: int = 512
    lora_slots: int = 0
    lora_rank: int = 0
    shares: bool = True
    watermark: float = 0.0
    unbounded: str = ""
    counts_weights: bool = False
    counts_graphs: bool = True
    workspace: int = 192 * MIB
    context: int = CONTEXT
    nccl: int = 1024 * MIB

    def __post_init__(self) -> None:
        for name in ("block_size", "max_num_seqs", "max_num_batched_tokens", "graph_ceiling"):
            positive(getattr(self, name), name)
        for name in ("lora_slots", "lora_rank", "workspace", "context", "nccl"):
            positive(getattr(self, name), name, 0)
        for name in ("max_model_len", "longest"):
            if getattr(self, name) is not None:
                positive(getattr(self, name), name)
        if not 0 <= self.watermark < 1:
            raise UsageError(
                f"watermark={self.watermark!r}: expected a share of the KV blocks, 0 or more and less than 1"
            )
        object.__setattr__(self, "dtype", dtype_name(self.dtype, "engine dtype"))
        if self.kv_dtype not in ("auto", "fp8", "fp8_e4m3", "fp8_e5m2"):
            object.__setattr__(self, "kv_dtype", dtype_name(self.kv_dtype, "kv_dtype"))

    @property
    def kv_width(self) -> int:
        """Bytes of a number in the KV cache."""
        if self.kv_dtype == "auto":
            return width(self.dtype)
        return 1 if self.kv_dtype.startswith("fp8") else width(self.kv_dtype)


def kv_token_bytes(model: ModelShape, engine: Engine) -> int:
    """Keys and values of one token in all layers (``vllm/v1/kv_cache_interface.py`` `AttentionSpec`).

    Sliding-window layers are counted like the others; vLLM's hybrid manager needs less for long sequences.
    """
    return 2 * model.kv_heads * model.head_dim * engine.kv_width * model.layers


def kv_block_bytes(model: ModelShape, engine: Engine) -> int:
    """A block of all layers."""
    return kv_token_bytes(model, engine) * engine.block_size


def unbounded(model: ModelShape, engine: Engine) -> str:
    """Why nobody can tell how much of a KV cache rollouts can fill; empty: `fill_blocks` can."""
    return engine.unbounded or ("" if model.family in FAMILIES else f"model_type {model.family!r} is not known")


def fill_blocks(model: ModelShape, engine: Engine, length: int) -> int:
    """KV blocks with which `max_num_seqs` sequences of `length` tokens run at once: more are never filled.

    vLLM runs no more sequences than that at once, gives none of them slots beyond its longest (``allocate_slots`` in
    ``vllm/v1/core/kv_cache_manager.py``, speculated tokens included) and takes blocks back when a sequence ends; cached
    prefixes lie in blocks of living sequences, or in free ones. Each sequence is rounded up to whole blocks, of 256 tokens
    where vLLM chooses their size. On top: block 0, a placeholder (``BlockPool.null_block``), and vLLM's watermark.

    Where attention looks at a window, which may begin anywhere within a block, a sequence has one more
    (``SlidingWindowSpec.max_admission_blocks_per_request``). If only some layers do, vLLM groups layers of a kind by as
    many as the rarer kind has, or up to half more, fills the last group of either kind up, and gives each group blocks of
    its own (``_get_kv_cache_groups_uniform_page_size``): counted as that many more layers, all of which keep the whole
    sequence.
    """
    rounding = engine.block_size if engine.told_block_size else max(engine.block_size, _LARGEST_BLOCK)
    each = -(-length // rounding) + (1 if model.windowed else 0)
    tokens = (engine.max_num_seqs * each + 1) * rounding
    padding = 3 * min(model.windowed, model.layers - model.windowed)
    blocks = -(-tokens * (model.layers + padding) // (model.layers * engine.block_size))
    return blocks if not engine.watermark else math.ceil(blocks / (1 - engine.watermark)) + 1


def padding_bytes(model: ModelShape, engine: Engine) -> int:
    """Rows that vLLM adds to embedding and LM head to fill 64."""
    rows = -model.vocab % _VOCAB_PAD
    return rows * model.hidden * width(engine.dtype) * (1 if model.tied else 2)


def buffer_bytes(model: ModelShape, engine: Engine, length: int) -> int:
    """Rotary table, input buffers and block tables: what the engine allocates once and keeps."""
    rotary = model.positions * model.rotary * width(engine.dtype)
    inputs = engine.max_num_batched_tokens * (3 * 8 + 2 * model.hidden)
    tables = engine.max_num_seqs * (-(-max(length, 1) // engine.block_size) * 4 + model.vocab * 4)
    return rotary + inputs + tables


def graph_sizes(engine: Engine) -> int:
    """How many batch sizes are captured (``vllm/config/vllm.py`` `_set_cudagraph_sizes`)."""
    if engine.eager:
        return 0
    most = min(2 * engine.max_num_seqs, engine.graph_ceiling, engine.max_num_batched_tokens)
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, most + 1, 16)]
    return sum(size <= most for size in sizes)


def graph_bytes(model: ModelShape, engine: Engine) -> int:
    """CUDA graphs: pieces of every layer and one whole graph for each captured size. An estimate."""
    return graph_sizes(engine) * ((model.layers + 1) * _PIECE + _FULL_GRAPH)


def activation_bytes(model: ModelShape, engine: Engine) -> int:
    """The peak of a forward pass over `max_num_batched_tokens` and of sampling: what vLLM's profiling finds."""
    h, q, k = model.hidden, model.heads * model.head_dim, model.kv_heads * model.head_dim
    c = width(engine.dtype)
    attention = 2 * h + 2 * (q + 2 * k) + q
    mlp = 2 * h + (3 if model.gated else 2) * model.intermediate
    experts = 0
    if model.experts:
        m = model.expert_intermediate
        # fused_moe: two intermediate caches of every routed token, and the output
        experts = 3 * h + model.experts_per_token * (max(2 * m, h) + m)
    body = engine.max_num_batched_tokens * max(attention, mlp, experts) * c
    return body + engine.max_num_seqs * model.vocab * _SAMPLER


def slot_bytes(model: ModelShape, engine: Engine) -> int:
    """vLLM's LoRA buffers, ``[slots, 1, rank, in]`` and ``[slots, 1, out, rank]`` of every linear layer."""
    if not engine.lora_slots:
        return 0
    columns = sum((t.inputs + t.outputs) * t.count for t in model.tensors if t.kind == LINEAR and t.name != "lm_head")
    return engine.lora_slots * engine.lora_rank * columns * width(engine.dtype)
