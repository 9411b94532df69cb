"""From a live TRL trainer, or its config and model, to the descriptions that `plan` takes.

Duck-typed, imports nothing heavy. To be called before the engine is built; the optimizer does not exist yet then and is
known by ``args.optim`` alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from rlpatch.allocator import expandable
from rlpatch.errors import UsageError
from rlpatch.memory.engine import Engine
from rlpatch.memory.model import LINEAR, OTHER, ModelShape, Tensor, dtype_name, from_config, width
from rlpatch.memory.optimizers import Trainable, optimizer
from rlpatch.memory.planning import Plan, plan
from rlpatch.memory.training import FULL, TILES, Training

PROMPT = 512  # tokens, where neither the config nor the caller bounds prompts; TRL's default until it had none
_TRL_TOKENS = 4096  # max_num_batched_tokens that TRL sets


@dataclass(frozen=True)
class Description:
    """What `plan` needs; unpacks in its order."""

    model: ModelShape
    training: Training
    engine: Engine

    def __iter__(self) -> Any:
        return iter((self.model, self.training, self.engine))


def describe(
    trainer_or_args: Any,
    model: Any = None,
    *,
    prompt: int | None = None,
    masters: bool = False,
    residual: str | None = None,
    input_casts: bool = True,
    parked: bool = False,
    expanded: bool | None = None,
    head: str = TILES,
    engine_dtype: str | None = None,
    engine: Mapping[str, Any] | None = None,
) -> Description:
    """Describe a trainer (or its config) and its model.

    Args:
        trainer_or_args: A TRL trainer, or a config such as `GRPOConfig`.
        model: The transformers or PEFT model; None: the trainer's.
        prompt: Tokens of the longest prompt, where the config has no ``max_prompt_length``.
        masters: Float32 masters are kept beside shared 16-bit weights.
        residual: dtype that the residual stream is kept in under autocast, if not the model's (see `Training`).
        input_casts: PEFT casts what adapters read, as it does by itself (see `Training`).
        parked: The optimizer's state waits in host memory between steps.
        expanded: torch's allocator expands its segments; None: as the environment says.
        head: ``"tiles"`` or ``"full"``, as this TRL computes log-probabilities (see `Training`).
        engine_dtype: vLLM's; None: the trainer's, bfloat16 if that is float32 (vLLM's ``"auto"`` does so).
        engine: Further fields of `Engine` (facts of the release, the KV cache's dtype, …).

    Raises:
        UsageError: there is no model, or its config cannot be planned.
    """
    args = getattr(trainer_or_args, "args", trainer_or_args)
    model = getattr(trainer_or_args, "model", None) if model is None else model
    if model is None or not hasattr(model, "named_parameters"):
        raise UsageError(
            f"describe(model={type(model).__name__}): expected a transformers model, or a trainer that has one"
        )
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = base.config.to_dict() if hasattr(base.config, "to_dict") else dict(vars(base.config))
    shape = from_config(
        config, name=str(getattr(base.config, "_name_or_path", "") or type(base).__name__), origin="model.config"
    )
    adapters = _adapters(model)
    quantized = bool(getattr(base, "is_loaded_in_4bit", False))
    dtype = _dtype(model, adapters, quantized) or shape.dtype
    if not quantized:
        shape = _counted(shape, model, bool(adapters))
    trainable = _trainable(model, "float32" if masters and not adapters else None)
    if not trainable:
        raise UsageError("describe(model=…): none of the model's parameters requires a gradient")
    mixed = "bfloat16" if _of(args, "bf16", False) else "float16" if _of(args, "fp16", False) else dtype
    autocast = bool(_of(args, "bf16", False) or _of(args, "fp16", False))
    completion = _of(args, "max_completion_length", 256)
    longest = _of(args, "vllm_max_model_length", None)
    notes = list(shape.notes)
    asked = prompt if prompt is not None else _of(args, "max_prompt_length", None)
    if asked is None:
        asked = max(longest - completion, 0) if longest else PROMPT
        if not longest:
            notes.append(f"the config bounds no prompts: {PROMPT} tokens assumed")
    beside = getattr(trainer_or_args, "ref_model", None)  # a trainer's exists before its engine does
    own = getattr(trainer_or_args, "optimizer", None) is not None
    if own:
        notes.append("the trainer was given an optimizer of its own")
    batch, accumulation = _of(args, "per_device_train_batch_size", 8), _of(args, "gradient_accumulation_steps", 1)
    steps = _of(args, "steps_per_generation", None) or accumulation
    training = Training(
        rank=max(adapters, default=0),
        targets=_targets(model, shape),
        quantized=quantized,
        double_quant=_double_quant(base),
        dtype=dtype,
        autocast=autocast,
        compute=mixed if width(mixed) <= width(dtype) else dtype,
        residual=residual if autocast else None,
        input_casts=input_casts,
        masters=masters and not adapters,
        optim="unknown" if own else _optim(_of(args, "optim", "adamw_torch_fused"), notes),
        parked=parked,
        batch=batch,
        prompt=asked,
        completion=completion,
        accumulation=accumulation,
        generate_every=steps * _of(args, "num_iterations", 1),
        checkpointing=bool(_of(args, "gradient_checkpointing", True)),
        reference=beside is not None or (bool(_of(args, "beta", 0.0)) and not adapters),
        reference_dtype=_dtype(beside, [], False) if hasattr(beside, "named_parameters") else None,
        head=TILES if head == FULL and _of(args, "use_liger_kernel", False) else head,
        attention=_attention(base.config),
        processes=_of(args, "world_size", 1),
        expandable_segments=expandable() if expanded is None else expanded,
        trainable=trainable,
    )
    fields: dict[str, Any] = dict(
        dtype=engine_dtype or ("bfloat16" if width(dtype) > 2 else dtype),
        max_num_seqs=batch * steps,
        max_num_batched_tokens=_TRL_TOKENS,
        max_model_len=longest or training.length,
    )
    return Description(replace(shape, notes=tuple(notes)), training, Engine(**{**fields, **(engine or {})}))


def plan_for(
    trainer_or_args: Any,
    model: Any = None,
    *,
    device: int | None = None,
    others: int = 0,
    margin: int | None = None,
    utilization: float | None = None,
    **description: Any,
) -> Plan:
    """The plan for a trainer about to build its engine.

    Args:
        device: Total memory in bytes; None: the current accelerator's, for which torch is asked.
        others: Bytes that others hold on it (reward models, other processes).
        margin: Bytes that stay free.
        utilization: The user's explicit ``vllm_gpu_memory_utilization``.
        description: Passed to `describe`.

    Raises:
        UsageError: there is no accelerator, or the description cannot be made.
    """
    if device is None:
        import torch

        if not torch.accelerator.is_available():
            raise UsageError("plan_for(device=None): there is no accelerator here; give its memory in bytes")
        device = int(torch.accelerator.get_memory_info()[1])
    shape, training, engine = describe(trainer_or_args, model, **description)
    return plan(shape, training, engine, device, margin=margin, others=others, utilization=utilization)


def _of(args: Any, name: str, default: Any) -> Any:
    value = getattr(args, name, None)
    return default if value is None else value


def _optim(optim: Any, notes: list[str]) -> str:
    name = str(getattr(optim, "value", optim))
    try:
        optimizer(name)
    except UsageError as error:
        notes.append(f"{error}. Counted like AdamW in float32")
        return "unknown"
    return name


def _adapters(model: Any) -> list[int]:
    """Ranks of the LoRA adapters of a PEFT model."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, Mapping):
        return []
    return [
        int(rank) for rank in (getattr(config, "r", 0) for config in configs.values()) if isinstance(rank, int)
    ] or [1]


def _targets(model: Any, shape: ModelShape) -> str | tuple[str, ...]:
    configs = getattr(model, "peft_config", None)
    names = {t.name for t in shape.tensors if t.kind == LINEAR}
    found: set[str] = set()
    for config in (configs or {}).values() if isinstance(configs, Mapping) else ():
        wanted = getattr(config, "target_modules", None)
        if isinstance(wanted, str) or wanted is None:
            return "all-linear"
        found |= {name.rsplit(".", 1)[-1] for name in wanted}
    return tuple(sorted(found & names)) or "all-linear"


def _is_adapter(name: str) -> bool:
    return ".lora_" in name or ".modules_to_save." in name


def _dtype(model: Any, adapters: list[int], quantized: bool) -> str | None:
    """Of most of the base's weights."""
    sizes: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not (adapters and _is_adapter(name)):
            sizes[str(parameter.dtype)] += parameter.numel()
    return dtype_name(sizes.most_common(1)[0][0]) if sizes else None


def _counted(shape: ModelShape, model: Any, adapted: bool) -> ModelShape:
    """`shape` with as many weights as the model has."""
    count = sum(p.numel() for name, p in model.named_parameters() if not (adapted and _is_adapter(name)))
    if count <= shape.parameters:
        return shape
    more = count - shape.parameters
    note = f"the model has {more:,} elements that its config does not tell of; they are counted"
    return replace(shape, tensors=(*shape.tensors, Tensor("others", (more,), 1, OTHER)), notes=(*shape.notes, note))


def _trainable(model: Any, dtype: str | None) -> tuple[Trainable, ...]:
    tables = getattr(model, "modules", lambda: ())()
    embeddings = {id(m.weight) for m in tables if type(m).__name__ == "Embedding" and hasattr(m, "weight")}
    groups: Counter[tuple[tuple[int, ...], str, bool]] = Counter()
    for parameter in model.parameters():
        if parameter.requires_grad:
            own = dtype or dtype_name(parameter.dtype)
            groups[tuple(parameter.shape), own, id(parameter) in embeddings] += 1
    return tuple(Trainable(sizes, count, own, embedding) for (sizes, own, embedding), count in groups.items())


def _double_quant(base: Any) -> bool:
    quantization = getattr(base.config, "quantization_config", None)
    if isinstance(quantization, Mapping):
        return bool(quantization.get("bnb_4bit_use_double_quant", False))
    return bool(getattr(quantization, "bnb_4bit_use_double_quant", False))


def _attention(config: Any) -> str:
    name = str(getattr(config, "_attn_implementation", None) or "sdpa")
    return "flash" if "flash" in name else "eager" if name == "eager" else "sdpa"
