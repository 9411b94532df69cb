"""The plan: what is resident while generating and while training, what is left for the KV cache, and whether it fits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from rlpatch.errors import UsageError
from rlpatch.memory import engine as vllm
from rlpatch.memory import training as trainer
from rlpatch.memory.engine import Engine
from rlpatch.memory.model import ModelShape, positive, width
from rlpatch.memory.optimizers import UNKNOWN, optimizer
from rlpatch.memory.sizes import MIB, show
from rlpatch.memory.training import Training

BOTH, GENERATING, TRAINING = "both", "generating", "training"
FILL, LEFT, ASKED = "all that rollouts can fill", "all that is left", "what the given utilization leaves"
_ENDLESS = "how much of a KV cache rollouts can fill is not known"
_SLACK = 256 * MIB  # of torch's allocator: rounding and half-used segments
_PINNED = 0.58  # of the memory that gradients and state settle in, while training; all of it between steps
_FOLD_SHARE, _FOLD_FACTORS = 0.02, 96 * MIB  # rlpatch/lora: what a fold keeps until the unfold, its factors
_MARGIN_SHARE, _MARGIN_LEAST = 0.01, 256 * MIB
_TIGHT_SHARE = 0.05
_STEPS = 10_000  # utilization is given to four digits

Choice = TypeVar("Choice")


@dataclass(frozen=True)
class Term:
    """One thing that takes memory.

    Attributes:
        name: For people.
        bytes: Its size.
        resident: ``"generating"``, ``"training"`` or ``"both"``.
        formula: How the size comes about.
        source: Where that is written.
        exact: To the byte; else an estimate.
        part: Bytes of it that are there at the moment that training needs most; None: all.
    """

    name: str
    bytes: int
    resident: str
    formula: str
    source: str
    exact: bool = False
    part: int | None = None

    @property
    def peak_bytes(self) -> int:
        """What of it is there at the moment that training needs most."""
        return self.bytes if self.part is None else self.part


@dataclass(frozen=True)
class Plan:
    """What goes where; sizes in bytes.

    Attributes:
        device: Memory of the device.
        available: Of that, what others leave.
        terms: In the order of the table; the KV cache is not among them.
        generating: Sum of what is resident while generating, without the KV cache.
        training: The same at the peak of a training step.
        moments: Sizes of the moments that can be that peak, without what is there always: ``"loss"``, ``"backward"``,
            ``"embedding"`` and ``"step"``.
        loading: While the engine takes the weights over.
        block_bytes: A KV block of all layers.
        block_size: Tokens of a block.
        kv_blocks: Blocks for the engine.
        left_blocks: Blocks that would fit while generating.
        sized_by: What `kv_blocks` are: `FILL`, all that rollouts can fill; `LEFT`, all that is left; `ASKED`, what an
            explicit utilization gives.
        gpu_memory_utilization: The most of the device that vLLM may count as its own, as a share: with it alone, it
            arrives at `left_blocks`.
        rollout_context: Tokens that every one of `sequences` could have at once in all that is left.
        sequences: Decoded at once.
        training_context: Tokens (prompt and completion) up to which training fits.
        needed_blocks: Blocks with which all `sequences` run at the planned length at once; more help prefixes only.
        rows: Sequences of a micro-batch.
        tokens: Of a micro-batch as planned, padding included.
        waiting: What its forward pass keeps until its backward pass; see `passes_beside`.
        refusal: Why it does not fit: which term is too large, by how much, and what to do; None: it fits.
        estimated: The refusal rests on estimated terms of training alone: what is exact fits, and so does all the rest.
        warnings: What deserves attention.
        notes: What was assumed.
    """

    device: int
    available: int
    terms: tuple[Term, ...]
    generating: int
    training: int
    moments: dict[str, int]
    loading: int
    block_bytes: int
    block_size: int
    kv_blocks: int
    left_blocks: int
    sized_by: str
    gpu_memory_utilization: float
    rollout_context: int
    sequences: int
    training_context: int
    needed_blocks: int
    rows: int
    tokens: int
    waiting: int
    refusal: str | None = None
    estimated: bool = False
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def peak(self) -> str:
        """The moment of training's peak."""
        return max(self.moments, key=lambda name: self.moments[name])

    @property
    def tight(self) -> bool:
        """Whether training leaves less than a twentieth of the device: what torch's allocator tears is an estimate."""
        return self.available - self.training < _TIGHT_SHARE * self.device

    @property
    def kv_cache_memory_bytes(self) -> int:
        """The KV cache, whole blocks; vLLM's setting of that name."""
        return self.kv_blocks * self.block_bytes

    @property
    def kv_left_bytes(self) -> int:
        """The largest KV cache that would fit, whole blocks."""
        return self.left_blocks * self.block_bytes

    @property
    def kv_tokens(self) -> int:
        """Tokens in the KV cache."""
        return self.kv_blocks * self.block_size

    def passes_beside(self, tokens: int | None = None, least: int = 0) -> int:
        """How many more forward passes can wait for their backward passes while one is at its peak, beside all that stays.

        An optimizer's state that does not exist before the first step counts as what stays. What the optimizer needs for
        its step does not count: nothing waits by then.

        Args:
            tokens: Of a micro-batch; None: as planned.
            least: Bytes that such a pass was seen to keep.
        """
        share = 1.0 if tokens is None else tokens / self.tokens
        fixed = sum(term.bytes for term in self.terms if term.name == "autocast copies")
        # a mask grows with the square of the length
        grown = math.ceil((self.waiting - fixed) * max(share, share * share))
        stays = self.training - self.moments[self.peak]
        passes = max(size for moment, size in self.moments.items() if moment != "step")
        return max(self.available - stays - passes, 0) // max(fixed + grown, least, 1)

    def __getitem__(self, name: str) -> Term:
        return next(term for term in self.terms if term.name == name)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            **asdict(self),
            "terms": [{**asdict(term), "peak_bytes": term.peak_bytes} for term in self.terms],
            "peak": self.peak,
            "passes_beside": self.passes_beside(),
            "kv_cache_memory_bytes": self.kv_cache_memory_bytes,
            "kv_left_bytes": self.kv_left_bytes,
            "kv_tokens": self.kv_tokens,
        }


def default_margin(device: int) -> int:
    """What stays free: a hundredth of the device, 256 MiB at least."""
    return max(int(device * _MARGIN_SHARE), _MARGIN_LEAST)


def plan(
    model: ModelShape,
    training: Training,
    engine: Engine,
    device: int,
    *,
    margin: int | None = None,
    others: int = 0,
    utilization: float | None = None,
) -> Plan:
    """Work out what fits.

    Args:
        device: Total memory in bytes, as CUDA reports it.
        margin: Bytes that stay free; None: `default_margin`.
        others: Bytes that other processes, or other models of this one (reward models), hold.
        utilization: ``gpu_memory_utilization`` that the user insists on.

    Raises:
        UsageError: an argument makes no sense. A plan that does not fit is returned, with `Plan.refusal`.
    """
    positive(device, "device")
    positive(others, "others", 0)
    margin = default_margin(device) if margin is None else positive(margin, "margin", 0)
    if utilization is not None and not (isinstance(utilization, (int, float)) and 0 < utilization <= 1):
        raise UsageError(f"gpu_memory_utilization={utilization!r}: expected a share of the device, above 0 and up to 1")
    available = max(device - others, 0)
    terms, held, moments, waiting = _terms(model, training, engine, margin)
    generating = sum(t.bytes for t in terms if t.resident != TRAINING)
    trains = sum(t.peak_bytes for t in terms if t.resident != GENERATING)
    weights = sum(t.bytes for t in terms if t.name in _WEIGHTS)
    shared = any(t.name == "weights, shared" for t in terms)
    # Shared: where two copies do not fit, the engine takes the weights over one by one (`rlpatch.sharing.late`).
    largest = max((t.elements for t in model.tensors), default=0) * width(engine.dtype)
    loading = held + margin + (largest if shared else _of(terms, "weights of the engine"))
    block = vllm.kv_block_bytes(model, engine)
    # The engine profiles and captures while the KV cache comes, so both moments bound it alike.
    left = blocks = max((available - generating) // block, 0)
    length = engine.max_model_len or training.length
    sized_by, endless = LEFT, vllm.unbounded(model, engine)
    counted = _counted(terms, engine, shared)
    warnings: list[str] = []
    if utilization is not None:
        own = max(math.ceil(utilization * device) - counted, 0)
        if own > blocks * block:
            warnings.append(_cannot_honour(utilization, own, blocks * block, counted, device, generating))
        else:
            left = blocks = min(blocks, own // block)
            sized_by = ASKED
    elif not endless and (fill := vllm.fill_blocks(model, engine, max(length, engine.longest or 0))) < left:
        blocks, sized_by = fill, FILL
    share = min(left * block + counted, max(available - held, 0)) / device if left else 0.0
    share = math.floor(min(share, 1.0) * _STEPS) / _STEPS
    per_sequence = -(-length // engine.block_size)
    usable = max(left - 1, 0)  # vLLM keeps block 0 as a placeholder
    context = min(usable // engine.max_num_seqs * engine.block_size, model.positions)
    made = Plan(
        device=device,
        available=available,
        terms=terms,
        generating=generating,
        training=trains,
        moments=moments,
        loading=loading,
        block_bytes=block,
        block_size=engine.block_size,
        kv_blocks=blocks,
        left_blocks=left,
        sized_by=sized_by,
        gpu_memory_utilization=share,
        rollout_context=context,
        sequences=engine.max_num_seqs,
        training_context=_training_context(model, training, engine, available, margin),
        needed_blocks=per_sequence * engine.max_num_seqs + 1,
        rows=training.batch,
        tokens=training.batch * training.length,
        waiting=waiting,
        warnings=tuple(warnings),
        notes=(*model.notes, *_notes(training), *([f"{_ENDLESS}: {endless}"] if endless else [])),
    )
    made = replace(made, refusal=_refusal(made, model, weights, per_sequence, length))
    if made.refusal is not None:
        certain = sum(t.peak_bytes for t in terms if t.resident != GENERATING and t.exact)
        rest_fits = max(weights, loading) <= available and blocks > per_sequence
        made = replace(made, estimated=trains > available >= certain and rest_fits)
    if made.refusal is None and made.kv_blocks < made.needed_blocks:
        text = (
            f"the KV cache holds {made.kv_tokens:,} tokens; {engine.max_num_seqs} sequences of {length} tokens want "
            f"{engine.max_num_seqs * per_sequence * engine.block_size:,}: vLLM will queue or preempt some"
        )
        made = replace(made, warnings=(*made.warnings, text))
    return made


_WEIGHTS = ("weights, shared", "weights of the trainer")


def _of(terms: tuple[Term, ...], name: str) -> int:
    return sum(term.bytes for term in terms if term.name == name)


def _terms(
    model: ModelShape, training: Training, engine: Engine, margin: int
) -> tuple[tuple[Term, ...], int, dict[str, int], int]:
    """The terms of the table, the bytes held when the engine is about to be built, the moments of training, and what a
    forward pass keeps."""
    sizes = trainer.measure(model, training)
    length = engine.max_model_len or training.length
    shares = engine.shares and (training.quantized or training.dtype == engine.dtype)
    terms: list[Term] = []

    def add(
        name: str, size: int, resident: str, formula: str, source: str, exact: bool = False,
        part: int | None = None,
    ) -> None:  # fmt: skip
        if size:
            terms.append(Term(name, int(size), resident, formula, source, exact, part))

    count = f"{model.parameters:,} weights"
    base = "bitsandbytes 4 bit, the rest" if training.quantized else f"{count} ×"
    padding = vllm.padding_bytes(model, engine)
    if shares:
        add("weights, shared", sizes.weights + padding, BOTH, f"{base} {training.dtype}, vocabulary padded to 64; one copy",
            "transformers' modeling file; vLLM vocab_parallel_embedding.py", exact=True)  # fmt: skip
    else:
        add(
            "weights of the trainer",
            sizes.weights,
            BOTH,
            f"{base} {training.dtype}",
            "transformers' modeling file",
            True,
        )
        own = trainer.weight_bytes(model, training, engine.dtype)
        add("weights of the engine", own + padding, BOTH, f"{base} {engine.dtype}, not shared: the dtypes differ"
            if engine.shares else f"{base} {engine.dtype}, not shared",
            "vLLM's model; vocab_parallel_embedding.py", exact=True)  # fmt: skip
    add("fp32 masters", sizes.masters, BOTH, "4 bytes per trained weight", "rlpatch", True)
    rank = f"rank × (in + out) of every adapted layer × {training.adapter_dtype}"
    add("LoRA", sizes.adapters, BOTH, rank, "peft/tuners/lora/layer.py", True)
    add(
        "LoRA slots",
        vllm.slot_bytes(model, engine),
        BOTH,
        "slots × max_lora_rank × (in + out)",
        "vllm/lora/layers",
        True,
    )
    add("reference model", sizes.reference, BOTH, f"{count} × {training.reference_dtype or training.dtype}",
        "trl GRPOTrainer ref_model (beta > 0, no LoRA)", True)  # fmt: skip
    how = UNKNOWN if training.optim == "unknown" else optimizer(training.optim)
    moments = sizes.moments
    totals = {name: sum(parts.values()) for name, parts in moments.items()}
    peak = max(totals, key=lambda name: totals[name])
    there = moments[peak]
    where = f"{training.optim}, of what is trained" + ("; in host memory between steps" if sizes.parked else "")
    add("optimizer state", sizes.optimizer, TRAINING if sizes.parked else BOTH, where, how.source, True,
        there.get("optimizer", 0) if sizes.parked else None)  # fmt: skip
    add(
        "DDP buckets",
        sizes.buckets,
        BOTH,
        "a copy of all gradients",
        "torch DistributedDataParallel, gradient_as_bucket_view off",
    )
    add("CUDA context", engine.context, BOTH, "context and kernels", "measured: 529 MiB bare on an H200")
    add("NCCL", engine.nccl if training.processes > 1 else 0, BOTH, "about 1 GiB per GPU", "measured")
    buffers = vllm.buffer_bytes(model, engine, length) + engine.workspace
    add("engine buffers", buffers, BOTH, "rotary table, input buffers, block tables, cuBLAS and attention workspaces",
        "vllm/v1/worker, rotary_embedding.py")  # fmt: skip
    sizes_text = f"{vllm.graph_sizes(engine)} sizes × ((layers + 1) × 0.25 MiB + 2 MiB)"
    add("CUDA graphs", vllm.graph_bytes(model, engine), BOTH, sizes_text, "vllm/config/vllm.py _set_cudagraph_sizes")
    # Gradients come in blocks that activations left, and state settles beside them: what goes away later cannot be
    # returned. Training itself fills a part of these blocks again.
    settled, unsettled = (0, 0) if training.expandable_segments else (sizes.settled, sizes.unsettled)
    where = "the head's gradient" if sizes.head_weight else "the smaller of gradients and activations"
    pinned = int(_PINNED * settled)
    add("pinned by the allocator", _SLACK + pinned, BOTH,
        f"{_SLACK // MIB} MiB" + (f" + {_PINNED:g} × {where}" if settled else ""),
        "torch's CUDACachingAllocator: a segment goes back whole or not at all; measured on an H200")  # fmt: skip
    add("pinned between steps", settled - pinned + unsettled // 2, GENERATING,
        "the rest of it, which the next step fills" + (", and half of what else they settle in" if unsettled else ""),
        "measured on an H200")  # fmt: skip
    add("torn blocks", 0 if training.expandable_segments else sizes.largest, TRAINING,
        "free blocks too small for the largest tensor of a layer: once more that tensor",
        "torch's CUDACachingAllocator; measured on an H200")  # fmt: skip
    add("engine activations", vllm.activation_bytes(model, engine), GENERATING,
        f"{engine.max_num_batched_tokens} tokens through the widest layer, {engine.max_num_seqs} sampled rows",
        "vllm/v1/worker profile_run")  # fmt: skip
    folds = shares and not training.full and not engine.lora_slots and not training.quantized
    if folds:
        kept = int(_FOLD_SHARE * model.bytes(training.dtype)) + _FOLD_FACTORS
        add(
            "fold", kept, GENERATING, "2 % of the weights, 96 MiB", "rlpatch/lora/fold_kernel.py: what the unfold needs"
        )
    always = sizes.gradients if sizes.keeps_gradients else 0
    part = sizes.gradients if always else there.get("gradients", 0)
    why = "; kept over rollouts within an accumulation" if always else ""
    if 0 < part < sizes.gradients:
        later = "the embedding's is not there yet" if part > sizes.head_gradient else "the LM head's is there"
        why = f", {show(sizes.gradients)} in the end; {later}"
    add("gradients", sizes.gradients, BOTH if always else TRAINING, f"of what is trained{why}", "torch autograd", True,
        part)  # fmt: skip
    add("end of the backward pass", sizes.embedding, TRAINING, "the residual stream's gradient" + (
        ", and the embedding's before it is added to the LM head's" if model.tied else ""), "torch autograd",
        part=there.get("embedding", 0))  # fmt: skip
    what = "every layer's input" if training.checkpointing else "what every layer saves for its backward pass"
    add("saved activations", sizes.checkpoints, TRAINING, f"{what}, {training.batch} × {training.length} tokens",
        "transformers' modeling file", part=there.get("checkpoints", 0))  # fmt: skip
    add("layer at work", sizes.layer, TRAINING, "the layer being recomputed and differentiated" if training.checkpointing
        else "the layer being differentiated", "transformers' modeling file", part=there.get("layer", 0))  # fmt: skip
    add("LM head and log-probabilities", sizes.head, TRAINING,
        "tiles of 4096 × 32768 logits, float32 gradient of the head if trained" if training.head == trainer.TILES
        else f"18 bytes × {training.batch} × {training.completion + 1} × {model.vocab} logits",
        "trl/kernels/chunked_logprob.py" if training.head == trainer.TILES else "trl _get_per_token_logps_and_entropies",
        part=there.get("head", 0))  # fmt: skip
    add("autocast copies", sizes.casts, TRAINING, f"what is trained in float32 once more in {training.compute}",
        "at::autocast::cached_cast", part=there.get("casts", 0))  # fmt: skip
    add("optimizer's workspace", sizes.step, TRAINING, "temporary tensors of a step", how.source,
        part=there.get("step", 0))  # fmt: skip
    add("margin", margin, BOTH, "stays free", "setting")
    held = sum(t.bytes for t in terms if t.name in _AT_START)
    return tuple(terms), held, totals, sizes.waiting


_AT_START = (*_WEIGHTS, "fp32 masters", "LoRA", "reference model", "CUDA context", "NCCL")
_COUNTED = ("engine buffers", "engine activations", "LoRA slots")


def _counted(terms: tuple[Term, ...], engine: Engine, shared: bool) -> int:
    """What vLLM's profiling takes for its own, the KV cache apart (``Worker.determine_available_memory``)."""
    own = sum(t.bytes for t in terms if t.name in _COUNTED)
    if engine.counts_graphs:
        own += _of(terms, "CUDA graphs")
    if not shared:
        own += _of(terms, "weights of the engine")
    elif engine.counts_weights:
        own += _of(terms, "weights, shared")
    return own


def _training_context(model: ModelShape, training: Training, engine: Engine, available: int, margin: int) -> int:
    """The longest sequence with which training fits, the prompt being what it is; 0: none."""

    def fits(completion: int) -> bool:
        terms, *_ = _terms(model, replace(training, completion=completion), engine, margin)
        return sum(t.peak_bytes for t in terms if t.resident != GENERATING) <= available

    low, high = 0, max(model.positions - training.prompt, 0)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low + training.prompt if low else 0


def _notes(training: Training) -> tuple[str, ...]:
    how = UNKNOWN if training.optim == "unknown" else optimizer(training.optim)
    note = how.source if training.optim == "unknown" else how.note
    return (f"{training.optim}: {note}",) if note else ()


def _cannot_honour(share: float, own: int, fits: int, counted: int, device: int, generating: int) -> str:
    least = math.floor(max(fits + counted, 0) / device * _STEPS) / _STEPS
    return (
        f"gpu_memory_utilization={share:g} cannot be honoured: it asks for a KV cache of {show(own)}, and beside "
        f"{show(generating)} that stay resident {show(fits)} fit. Leave it unset, or set it to {least:g}"
    )


def first_that_fits(
    parking: bool | str, expanding: bool | str, make: Callable[[bool, bool], tuple[Choice, Plan] | None]
) -> tuple[Choice, Plan]:
    """Of what may be done in order to fit, in the order of what it costs a step, the first that fits; if nothing does, what
    leaves the least missing. Where it fits only just (`Plan.tight`), segments are expanded as well, if they may be.

    Args:
        parking: Whether the optimizer's state is parked; ``"auto"``: if nothing fits without.
        expanding: Whether torch's allocator expands its segments, likewise.
        make: Parked, expanded -> choice and plan; None: not to be had. The first always is.
    """
    best: tuple[Choice, Plan] | None = None
    for parked in (False, True) if parking == "auto" else (bool(parking),):
        for expanded in (False, True) if expanding == "auto" else (bool(expanding),):
            found = make(parked, expanded)
            if found is None:
                continue
            one = found[1]
            if (
                best is None
                or one.refusal is None
                or one.training < best[1].training
                or one.left_blocks > best[1].left_blocks
            ):
                best = found
            if one.refusal is None and not (one.tight and expanding == "auto"):
                return found
        if best is not None and best[1].refusal is None:
            break
    assert best is not None
    return best


# ---- when it does not fit --------------------------------------------------------------------------------------------

_REMEDIES = {
    "weights, shared": "a smaller model, or a 4-bit base with a LoRA",
    "weights of the trainer": "the engine's dtype for the trainer, so that the weights are shared",
    "weights of the engine": "the engine's dtype for the trainer, so that the weights are shared",
    "fp32 masters": "a LoRA, or training the 16-bit weights as they are",
    "LoRA": "a lower rank",
    "LoRA slots": "the fold (apply(lora='fold')), which needs none",
    "reference model": "beta=0, or a LoRA, whose base is its own reference",
    "optimizer state": "apply(park_optimizer=True), optim='adamw_8bit' or 'adafactor', or a LoRA",
    "gradients": "a LoRA, or 16-bit weights",
    "DDP buckets": "a LoRA",
    "saved activations": "gradient_checkpointing=True, a smaller per_device_train_batch_size or shorter completions",
    "layer at work": "a smaller per_device_train_batch_size or shorter completions",
    "LM head and log-probabilities": "a smaller per_device_train_batch_size, or TRL from 1.15, which tiles the logits",
    "autocast copies": "16-bit weights",
    "optimizer's workspace": "optim='adamw_torch_fused'",
    "pinned between steps": "apply(expandable_segments=True)",
    "torn blocks": "apply(expandable_segments=True)",
    "pinned by the allocator": "apply(expandable_segments=True)",
    "engine activations": "a smaller max_num_batched_tokens or max_num_seqs",
    "CUDA graphs": "enforce_eager=True or a smaller max_num_seqs",
}


def _blame(terms: list[Term], over: int) -> str:
    """The term to look at: the largest that has a remedy and, if there is one, could make up for `over`."""
    candidates = [t for t in terms if t.name in _REMEDIES and not (t.name == "weights, shared" and len(terms) > 1)]
    weights = [t for t in terms if t.name == "weights, shared"]
    largest = max(candidates or weights or terms, key=lambda t: t.bytes)
    if weights and weights[0].bytes > largest.bytes * 4:
        largest = weights[0]
    remedy = _REMEDIES.get(largest.name)
    text = f"The largest that can be changed is {largest.name!r}, {show(largest.bytes)}"
    return text + (f"; try {remedy}" if remedy else "")


def _refusal(made: Plan, model: ModelShape, weights: int, per_sequence: int, length: int) -> str | None:
    room, shared = made.available, any(t.name == "weights, shared" for t in made.terms)
    if weights > room:
        return (
            f"the weights of {model.name} take {show(weights)}, {show(weights - room)} more than the {show(room)} of the "
            f"device: {_REMEDIES['weights, shared']}, or a larger GPU"
        )
    if made.training > room:
        over = made.training - room
        there = [replace(t, bytes=t.peak_bytes) for t in made.terms if t.resident != GENERATING and t.peak_bytes]
        return (
            f"training needs {show(made.training)} at its peak ({made.peak}), {show(over)} more than the {show(room)} of "
            f"the device. {_blame(there, over)}"
        )
    if made.loading > room:
        over = made.loading - room
        return (
            f"loading the engine needs {show(made.loading)}, {show(over)} more than the {show(room)} of the device: beside "
            f"what the trainer holds, {'the largest weight' if shared else 'the weights of the engine'}. A smaller model, "
            "or a 4-bit base with a LoRA"
        )
    need = (per_sequence + 1) * made.block_bytes
    left = made.kv_blocks * made.block_bytes
    if left < need:
        there = [t for t in made.terms if t.resident != TRAINING]
        short = need - left if made.kv_blocks else need - (room - made.generating)
        return (
            f"the KV cache of one sequence of {length} tokens takes {show(need)}, and {show(left)} are left for it while "
            f"generating: {show(short)} are missing. {_blame(there, short)}"
        )
    return None


def fit_blocks(wanted_blocks: int, bytes_per_block: int, free_bytes: int, margin: int = 0) -> int:
    """How many of `wanted_blocks` fit into `free_bytes` with `margin` left over, when a KV cache comes back; 0: none.

    Raises:
        UsageError: a number makes no sense.
    """
    positive(wanted_blocks, "wanted_blocks", 0)
    positive(bytes_per_block, "bytes_per_block")
    positive(margin, "margin", 0)
    return max(min(wanted_blocks, (free_bytes - margin) // bytes_per_block), 0)
