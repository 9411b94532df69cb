"""What the trainer holds, and what it needs for a moment, in bytes.

The activations are counted tensor by tensor as transformers' modeling files save them for the backward pass, with an
attention that keeps nothing quadratic but its mask. `tests/unit/test_memory_torch.py` runs real models under a dispatch
mode that adds up live storages, and compares.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from rlpatch.errors import UsageError
from rlpatch.memory.model import EMBEDDING, EXPERTS, LINEAR, OTHER, ModelShape, Tensor, dtype_name, positive, width
from rlpatch.memory.optimizers import UNKNOWN, Optimizer, Trainable, optimizer

TILES, FULL = "tiles", "full"
_TILE_TOKENS, _TILE_VOCAB = 4096, 32768  # trl/kernels/chunked_logprob.py TOKEN_CHUNK_SIZE, trl/trainer/utils.py
_PIECE = 1 << 28  # rlpatch/precision/masters.py PIECE
# what reads the same norm's output
_READERS = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
_KEPT = 64  # bytes per token of a completion: numbers of up to 8 bytes, some of them in two copies
_LOGIT = 18  # bytes per logit at the peak of the full path: 16 measured with float32 logits, 2 for their bf16 gradient


@dataclass(frozen=True)
class Training:
    """How the model is trained.

    Attributes:
        rank: Of the LoRA; 0: the whole model is trained.
        targets: ``target_modules`` of the LoRA.
        adapter_dtype: Of the LoRA's weights (PEFT casts bf16 and fp16 adapters to float32 by itself).
        quantized: The base is kept in bitsandbytes' 4 bits (nf4 or fp4).
        double_quant: Its scales are quantized, too.
        dtype: Of the trainer's weights.
        compute: Of the activations (bf16=True: bfloat16).
        residual: Of the residual stream, if it is wider than `dtype` (rlpatch keeps plain scripts' in float32); None: not.
        autocast: It is autocast that makes them so; without it, float32 adapters compute in float32 beside a 16-bit base.
        input_casts: Under autocast each adapted layer makes copies of a 16-bit input, as PEFT does by itself; False: the
            adapters read the input as it is (capability ``lora_casts``).
        masters: Float32 copies of what is trained, beside weights in `dtype` that the engine shares.
        optim: transformers' name of the optimizer.
        parked: Its state is on the device only while it steps (`rlpatch.parking`).
        batch: Sequences in one forward and backward pass (``per_device_train_batch_size``).
        prompt: Tokens of the longest prompt.
        completion: Tokens of the longest completion.
        accumulation: ``gradient_accumulation_steps``.
        generate_every: Backward passes from one rollout to the next (``steps_per_generation * num_iterations``); None: as
            many as are accumulated, TRL's default.
        checkpointing: Gradient checkpointing.
        reference: A frozen copy of the model for the KL term (beta > 0 without a LoRA).
        reference_dtype: Of it; None: `dtype`.
        head: How TRL computes log-probabilities: ``"tiles"`` (its fused LM head, TRL from 1.15; Liger's path in releases
            before) or ``"full"`` (all logits at once).
        attention: ``"sdpa"``, ``"flash"`` (no mask) or ``"eager"`` (keeps the scores).
        processes: Data-parallel processes.
        expandable_segments: torch's allocator runs with expandable segments.
        trainable: What is trained, if known better than from `rank` and `targets`.
    """

    rank: int = 0
    targets: str | tuple[str, ...] = "all-linear"
    adapter_dtype: str = "float32"
    quantized: bool = False
    double_quant: bool = True
    dtype: str = "bfloat16"
    compute: str = "bfloat16"
    residual: str | None = None
    autocast: bool = True
    input_casts: bool = True
    masters: bool = False
    optim: str = "adamw_torch_fused"
    parked: bool = False
    batch: int = 8
    prompt: int = 512
    completion: int = 256
    accumulation: int = 1
    generate_every: int | None = None
    checkpointing: bool = True
    reference: bool = False
    reference_dtype: str | None = None
    head: str = TILES
    attention: str = "sdpa"
    processes: int = 1
    expandable_segments: bool = False
    trainable: tuple[Trainable, ...] | None = None

    def __post_init__(self) -> None:
        for name, least in (
            ("rank", 0), ("batch", 1), ("prompt", 0), ("completion", 1), ("accumulation", 1), ("processes", 1)
        ):  # fmt: skip
            positive(getattr(self, name), name, least)
        if self.generate_every is not None:
            positive(self.generate_every, "generate_every")
        for name in ("dtype", "compute", "residual", "adapter_dtype", "reference_dtype"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, dtype_name(getattr(self, name), name))
        if self.quantized and not self.rank and self.trainable is None:
            raise UsageError("quantized=True: a 4-bit base cannot be trained itself; give a LoRA rank")
        if self.head not in (TILES, FULL):
            raise UsageError(f"head={self.head!r}: expected {TILES!r} or {FULL!r}")
        if self.attention not in ("sdpa", "flash", "eager"):
            raise UsageError(f"attention={self.attention!r}: expected 'sdpa', 'flash' or 'eager'")

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return self.prompt + self.completion

    @property
    def full(self) -> bool:
        """Whether the model's own weights are trained."""
        return not self.rank


@dataclass(frozen=True)
class TrainingBytes:
    """Bytes by purpose; see `measure`.

    Attributes:
        weights: The trainer's own weights, as they would be without sharing.
        masters: Float32 copies of what is trained.
        adapters: The LoRA's weights.
        reference: The reference model.
        optimizer: Optimizer state.
        gradients: All of them; in float32 where masters add up micro-batches.
        head_gradient: Of these, the LM head's: the first to come in a backward pass.
        embedding_gradient: Of these, the embedding's: the last to come; 0 where it is the LM head's, too.
        buckets: What DDP copies gradients into.
        checkpoints: Saved from the forward for the backward pass: every layer's input, or all that every layer saves.
        layer: The layer that is recomputed and differentiated, on top of `checkpoints`.
        head: LM head and log-probabilities at their peak, gradient of the head's weight included.
        head_weight: Of these, what the gradient of the head's weight takes (float32, and once more as wide as the weight).
        head_kept: What LM head and log-probabilities keep from their forward to their backward pass.
        casts: bf16 copies of float32 weights that autocast keeps.
        embedding: What the end of a backward pass needs beside gradients: that of the residual stream, and where the
            embedding is the LM head, what both contribute before it is added up.
        largest: The largest tensor that comes and goes within a layer.
        step: The optimizer's temporary tensors.
        parked: Whether the optimizer's state is there only while it steps.
        keeps_gradients: Whether rollouts happen with gradients half accumulated.
        accumulates: Whether a step has more than one backward pass.
    """

    weights: int
    masters: int
    adapters: int
    reference: int
    optimizer: int
    gradients: int
    head_gradient: int
    embedding_gradient: int
    buckets: int
    checkpoints: int
    layer: int
    head: int
    head_weight: int
    head_kept: int
    casts: int
    embedding: int
    largest: int
    step: int
    keeps_gradients: bool
    accumulates: bool
    parked: bool = False

    @property
    def moments(self) -> dict[str, dict[str, int]]:
        """What is needed at once, beyond what always stays, at the moments that can be the peak of a step.

        ``"loss"``: the forward pass is over, the LM head is differentiated; gradients are there from earlier passes only.
        ``"backward"``: layer after layer checkpoints go and gradients come, so the larger of the two counts, and both
        when gradients are accumulated. ``"embedding"``: all gradients are there, the last has just come. ``"step"``:
        gradients and what the optimizer needs, its state as well where that is parked otherwise.
        """
        earlier = {"gradients": self.gradients} if self.accumulates else {}
        fetched = {"optimizer": self.optimizer} if self.parked else {}
        first, last = self.head_gradient + self.checkpoints, self.gradients - self.embedding_gradient
        if self.accumulates:
            backward = {"gradients": self.gradients, "checkpoints": self.checkpoints, "embedding": self.embedding}
        elif last > first:
            backward = {"gradients": last}
        else:
            backward = {"gradients": self.head_gradient, "checkpoints": self.checkpoints}
        return {
            "loss": {**earlier, "checkpoints": self.checkpoints, "head": self.head, "casts": self.casts},
            "backward": {**backward, "layer": self.layer, "casts": self.casts},
            "embedding": {"gradients": self.gradients, "embedding": self.embedding},
            "step": {"gradients": self.gradients, "step": self.step, **fetched},
        }

    @property
    def waiting(self) -> int:
        """What one forward pass keeps until its backward pass begins."""
        return self.checkpoints + self.head_kept + self.casts

    @property
    def transient(self) -> int:
        """The most that comes and goes in one forward and backward pass, gradients apart."""
        return max(self.checkpoints + self.head, self.checkpoints + self.layer) + self.casts

    @property
    def settled(self) -> int:
        """Of what comes and goes, the memory in which gradients and optimizer state settle first.

        The blocks of a trained head's gradient are by far the largest of a step, and free when the first gradients come.
        """
        return min(self.head_weight or self.transient, self.gradients)

    @property
    def unsettled(self) -> int:
        """What else they may settle in: of the rest, what is more than `settled`."""
        rest = self.transient - (self.head_weight or self.transient) - self.settled
        return min(max(rest, 0), self.gradients)


def quantized_bytes(elements: int, double_quant: bool = True) -> int:
    """One weight in bitsandbytes' 4 bits with its scales (``bitsandbytes/functional.py`` `quantize_4bit`).

    Two elements a byte; an ``absmax`` per 64: float32, or uint8 with a float32 ``absmax`` per 256 of them, a float32
    offset and a codebook of 256; and a codebook of 16.
    """
    blocks = -(-elements // 64)
    scales = blocks + -(-blocks // 256) * 4 + 256 * 4 + 4 if double_quant else blocks * 4
    return -(-elements // 2) + scales + 16 * 4


def weight_bytes(model: ModelShape, training: Training, dtype: str | None = None) -> int:
    """The base's weights as the trainer keeps them; linear layers but the LM head in 4 bits if it is quantized."""
    size = width(dtype or training.dtype)
    if not training.quantized:
        return model.parameters * size
    total = 0
    for tensor in model.tensors:
        small = tensor.kind == LINEAR and tensor.name != "lm_head"
        one = quantized_bytes(tensor.elements, training.double_quant) if small else tensor.elements * size
        total += one * tensor.count
    return total


def trainables(model: ModelShape, training: Training) -> tuple[Trainable, ...]:
    """What is trained, as the optimizer sees it."""
    if training.trainable is not None:
        return training.trainable
    if training.full:
        dtype = "float32" if training.masters else training.dtype
        return tuple(Trainable(t.shape, t.count, dtype, t.kind == EMBEDDING) for t in model.tensors)
    pairs: list[Trainable] = []
    rank, dtype = training.rank, training.adapter_dtype

    def pair(inputs: int, outputs: int, columns: int, count: int) -> None:
        pairs.append(Trainable((columns, inputs), count, dtype))
        pairs.append(Trainable((outputs, columns), count, dtype))

    for tensor in model.linears(training.targets):
        pair(tensor.inputs, tensor.outputs, rank, tensor.count)
    if training.targets == "all-linear":
        # PEFT 0.21 with transformers 5 adapts routers and fused experts, too; gate and up have a rank each
        for tensor in model.tensors:
            if tensor.kind == EXPERTS:
                experts, outputs, inputs = tensor.shape
                pair(inputs, outputs, experts * rank * (2 if "gate_up" in tensor.name else 1), tensor.count)
            elif tensor.kind == OTHER and tensor.name == "router":
                pair(tensor.shape[1], tensor.shape[0], rank, tensor.count)
    return tuple(pairs)


def layer_bytes(model: ModelShape, training: Training) -> tuple[int, int, int]:
    """Bytes of activations per token: (what one layer saves, what its backward needs on top, a layer's input).

    With c bytes a number, h the hidden width, q and k the widths of all query and key heads, i the MLP's:

    - each norm: its float32 input 4h, the normalized tensor ch if its weight is trained, its output ch if a linear layer
      of which the weight is trained reads it; LayerNorm keeps its input, ch, instead of the float32 copy
    - where autocast finds a float32 residual stream: norms of it give float32, the normalized tensor is 4h, and each linear
      layer of which the weight is trained keeps a c-byte copy of its own
    - attention: queries, keys, values and output, c(2q + 2k); norms of queries and keys (4 + c)(q + k)
    - MLP: gate, activation, up and product, 4ci; without a trained weight to feed, 3ci
    - a LoRA: every adapted layer's input once more (PEFT's ``_cast_input_dtype`` makes a float32 copy for each layer, of
      which autocast saves a 16-bit one; without autocast the float32 copy itself is saved), and its rank. With
      `Training.input_casts` off a 16-bit input is saved itself: a norm's output once for all that read it, and the
      attention's not again
    - sdpa: the mask of padded sequences, which torch turns into c bytes per pair of tokens in each layer (`mask_bytes`)
    - experts: per routed token its input and output ch each, and 4c times the expert's width
    """
    h, q, k = model.hidden, model.heads * model.head_dim, model.kv_heads * model.head_dim
    c = width(training.compute)
    wide = width(training.dtype) == 4 and c < 4 and not training.quantized  # float32 weights under autocast
    own = 4 if width(training.dtype) == 4 and not training.quantized else c
    stream = width(training.residual) if training.residual else own  # bytes of the residual stream
    mixed = c < 4 and stream == 4  # norms of the stream are as wide as it is, whatever their weights are
    full = training.full
    if model.rms:
        # gemma multiplies, and olmo2 scales, in float32
        always = model.family.startswith(("gemma", "olmo"))
        norm = (4 + ((4 if mixed or always else c) if full else 0)) * h
        heads = (4 + ((4 if wide or always else c) if full else 0)) * (q + k) if model.qk_norm else 0
    else:
        norm, heads = stream * h, 0
    saved = model.norms * norm + heads
    saved += c * (2 * q + 2 * k)
    if full:
        saved += 5 * c * h if mixed else 2 * c * h
    fused = any(t.name in ("qkv_proj", "c_attn", "query_key_value") for t in model.tensors)
    if fused:
        saved += 3 * (q + 2 * k) * c // 2
    if training.attention == "sdpa":
        saved += 2 * c * (q - k)  # keys and values repeated for grouped queries
    saved += 4 * model.heads + 4 * 2 * (model.heads + model.kv_heads)  # log-sum-exps and norms' scales

    def mlp(columns: int) -> int:
        if not model.gated:
            return (10 if model.family == "gpt2" else 4) * columns * c // 2 * (2 if c == 4 else 1)
        return (4 if full else 3) * c * columns

    dense = model.experts == 0 or any(t.kind == LINEAR and t.name in ("down_proj", "c_fc") for t in model.tensors)
    routed = 0
    if model.experts:
        e = 4 if wide else c
        routed = model.experts_per_token * e * (2 * h + 4 * model.expert_intermediate) + 16 * model.experts
        if not full:
            # adapted inputs of the experts, and what ParamWrapper keeps of both halves
            routed += model.experts_per_token * c * 2 * model.expert_intermediate + 2 * c * h
    saved += max(mlp(model.intermediate) if dense else 0, routed)
    if not full:
        names = {t.name for t in model.linears(training.targets)} if training.rank else set()
        per_layer = [t for t in model.tensors if t.kind == LINEAR and t.name in names and t.name != "lm_head"]
        places, each = _distinct(per_layer), c if training.autocast else 4
        saved += 4 * max(training.rank, 1) * len(places)
        saved += each * sum(t.inputs for t in _saved_inputs(places, training, mixed, fused))
    if mixed:
        saved = saved * 102 // 100  # rotary embeddings in float32 and the like
    if _plain(model):
        # At the MLP's product its gradient and the gate's are there; with a LoRA also the adapter's gradient of the input,
        # in 16 bits and in float32, unless it takes the input as it is. At the attention, the MLP's are gone.
        mlp_peak = 2 * c * model.intermediate
        if not full and c < 4 and not _bare(training):
            mlp_peak += c * model.intermediate + 4 * c * h if training.autocast else 5 * c * h
        extra = max(mlp_peak, 8 * c * max(h, q) - 4 * c * model.intermediate)
        return saved, extra, stream * h
    e = 4 if wide and model.experts else c
    extra = max(
        3 * c * model.intermediate + 2 * c * h if dense else 0,
        22 * h,
        model.experts_per_token * e * (3 * model.expert_intermediate + 2 * h),
    )
    return saved, extra, stream * h


def _plain(model: ModelShape) -> bool:
    """A dense decoder like Llama and Qwen, for which the peaks are known term by term; others get a bound."""
    fused = any(t.name in ("qkv_proj", "c_attn", "query_key_value") for t in model.tensors)
    return model.gated and model.rms and not (fused or model.experts or model.family.startswith(("gemma", "olmo")))


def _base_bytes(model: ModelShape, training: Training, stream: int) -> int:
    """Per token, outside of the layers: the last norm's input, float32 copy (if the stream was widened, what it was
    widened from) and output, its normalized tensor if it is trained, cosines and sines, and indices.

    `stream`: bytes of the residual stream.
    """
    if not _plain(model):
        return 14 * model.hidden
    c = width(training.compute)
    edges, angle = (2 * stream + c * model.hidden, 4) if training.residual else (3 * stream, c)
    return edges + (c * model.hidden if training.full else 0) + 2 * angle * model.head_dim + 64


def _bare(training: Training) -> bool:
    """Whether adapters read 16-bit inputs as they are."""
    return training.autocast and not training.input_casts and width(training.compute) < 4


def _saved_inputs(tensors: list[Tensor], training: Training, mixed: bool, fused: bool) -> list[Tensor]:
    """Of the adapted layers, one for each input that is kept for their sake.

    `mixed`: norms' outputs are float32, of which autocast makes a copy for each layer that reads them.
    """
    if not _bare(training):
        return tensors
    kept: dict[tuple[str, int, int], Tensor] = {}
    for t in tensors:
        if t.name == "o_proj" and not fused:
            continue  # behind fused projections, attention may have to copy its output
        reader = t.name if mixed else _READERS.get(t.name, t.name)
        kept[(reader, 0, 0) if reader in _READERS.values() else (t.name, t.inputs, t.outputs)] = t
    return list(kept.values())


def _distinct(tensors: list[Tensor]) -> list[Tensor]:
    """One per place in a layer: GPT-2 has two layers of the name c_proj."""
    return list({(t.name, t.inputs, t.outputs): t for t in tensors}.values())


def mask_bytes(training: Training) -> int:
    """The mask of padded sequences, a byte per pair of tokens; flash attention needs none.

    torch's ``scaled_dot_product_attention`` makes numbers of it in every layer (``convert_boolean_attn_mask``) and saves
    these for the backward pass.
    """
    return 0 if training.attention == "flash" else training.batch * training.length**2


def head_bytes(model: ModelShape, training: Training) -> int:
    """The LM head and the log-probabilities of the completions, at the peak of their backward pass."""
    tokens, c = training.batch * training.completion, width(training.compute)
    weight = head_weight_bytes(model, training)
    if training.head == FULL:
        return training.batch * (training.completion + 1) * model.vocab * _LOGIT + weight // 2
    tile = min(tokens, _TILE_TOKENS) * _TILE_VOCAB * c  # as wide whatever the vocabulary is
    piece = min(_TILE_VOCAB, model.vocab) * model.hidden * c if width(training.dtype) > c else 0
    # hidden states picked out, their gradient in float32 and cast, running sums
    return tile + piece + weight + tokens * model.hidden * (c + 4 + c) + tokens * 7 * 4


def head_kept_bytes(model: ModelShape, training: Training) -> int:
    """What LM head and log-probabilities keep from the forward to the backward pass: float32 logits, or with tiles the
    hidden states picked out; labels, log-sum-exps, log-probabilities, entropies and their mask."""
    tokens = training.batch * training.completion
    if training.head == FULL:
        return training.batch * (training.completion + 1) * model.vocab * 4 + tokens * _KEPT
    return tokens * (model.hidden * width(training.compute) + _KEPT)


def head_weight_bytes(model: ModelShape, training: Training) -> int:
    """The gradient of the LM head's weight, in float32 and as wide as the weight; 0 under a LoRA."""
    return model.vocab * model.hidden * (4 + width(training.dtype)) if training.full else 0


def measure(model: ModelShape, training: Training) -> TrainingBytes:
    """Everything that training holds, by purpose.

    Raises:
        UsageError: the optimizer or a LoRA target is not known.
    """
    tensors = trainables(model, training)
    how = _optimizer(training)
    trained = sum(t.elements * t.count for t in tensors)
    tokens = training.batch * training.length
    saved, extra, stream = layer_bytes(model, training)
    mask = mask_bytes(training)
    if training.attention == "eager":
        scores = training.batch * model.heads * training.length**2 * (4 + 2 * width(training.compute))
    else:
        scores = 0
    layer = tokens * saved + scores + mask * width(training.compute)
    base = mask + tokens * _base_bytes(model, training, stream)
    if training.checkpointing:
        checkpoints, recomputed = model.layers * tokens * stream + base, layer + tokens * extra
    else:
        # all is still saved when the last norm is differentiated, in float32
        norm = (24 if stream == 4 * model.hidden else 22) * model.hidden if width(training.compute) < 4 else 0
        checkpoints, recomputed = model.layers * layer + base, tokens * max(extra, norm) + scores
    if training.quantized:  # bitsandbytes unpacks one weight at a time (`MatMul4Bit`)
        recomputed += max((t.elements for t in model.linears()), default=0) * width(training.compute)
    masters, step = 0, how.workspace_bytes(tensors)
    arriving = tensors  # as autograd makes gradients of them
    if training.masters and training.full:
        masters = trained * 4
        if training.accumulation == training.processes == 1 and how.pieces:  # each piece is a step of its own
            arriving = tuple(replace(t, dtype=training.dtype) for t in tensors)
            piece = 4 * max(min(trained, _PIECE), max((t.elements for t in tensors), default=0))
            step = piece + min(step, piece)
    gradients = sum(t.bytes for t in arriving)
    recomputed += min(gradients, checkpoints) // model.layers  # its own gradients, beside what later layers left
    first, last, tied = _edges(model, training, arriving)
    every = training.generate_every or training.accumulation
    return TrainingBytes(
        weights=weight_bytes(model, training),
        masters=masters,
        adapters=0 if training.full else sum(t.bytes for t in tensors),
        reference=weight_bytes(model, replace(training, quantized=False), training.reference_dtype)
        if training.reference
        else 0,
        optimizer=how.state_bytes(tensors),
        gradients=gradients,
        head_gradient=first,
        embedding_gradient=last,
        buckets=gradients if training.processes > 1 else 0,
        checkpoints=checkpoints,
        layer=recomputed,
        head=head_bytes(model, training),
        head_weight=head_weight_bytes(model, training) if training.head == TILES else 0,
        head_kept=head_kept_bytes(model, training),
        casts=_casts(model, training, tensors),
        embedding=tied + tokens * (stream + 4 * model.hidden) if training.full else 0,
        largest=tokens * _widest(model, training),
        step=step,
        keeps_gradients=every % training.accumulation != 0,
        accumulates=training.accumulation > 1,
        parked=training.parked,
    )


def _edges(model: ModelShape, training: Training, tensors: tuple[Trainable, ...]) -> tuple[int, int, int]:
    """The gradients of the LM head and of the embedding (0: it is the same), and the latter's share of a tied one."""
    if not training.full:
        return 0, 0, 0
    matrices = [t for t in tensors if t.elements == model.vocab * model.hidden]
    head, embedding = (sum(t.bytes for t in matrices if t.embedding is kind) for kind in (False, True))
    if model.tied:
        return embedding, 0, embedding and model.vocab * model.hidden * width(training.dtype)
    return head, embedding, 0


def _widest(model: ModelShape, training: Training) -> int:
    """Bytes per token of the largest tensor that a layer makes: an adapter's input in float32 (PEFT's cast, if it is made),
    the MLP's product, or a norm's float32 copy."""
    c, query = width(training.compute), model.heads * model.head_dim
    widths = [4 * model.hidden, c * model.intermediate, c * query]
    widths.append(c * model.experts_per_token * model.expert_intermediate)
    if training.rank and training.adapter_dtype == "float32" and not _bare(training):
        widths += [4 * t.inputs for t in model.linears(training.targets) if t.name != "lm_head"]
    return max(widths)


def _casts(model: ModelShape, training: Training, tensors: tuple[Trainable, ...]) -> int:
    """Float32 weights that autocast copies in the forward pass and caches until its end: leaves with a gradient only."""
    narrow = width(training.compute)
    if narrow >= 4 or (training.full and width(training.dtype) < 4):
        return 0
    if training.full:
        return model.parameters * narrow
    return sum(t.elements * t.count for t in tensors if width(t.dtype) == 4) * narrow


def _optimizer(training: Training) -> Optimizer:
    return UNKNOWN if training.optim == "unknown" else optimizer(training.optim)
