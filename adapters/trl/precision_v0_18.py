"""The precision of the policy, decided when its trainer is constructed (0.18 and later).

``GRPOTrainer.__init__`` and ``RLOOTrainer.__init__`` load a model given as a path at their start: through
``AutoModelForCausalLM.from_pretrained`` (0.18), the architecture's class (0.20), ``create_model_from_path`` (0.26); in
float32, which is transformers 4's default up to 0.26 and TRL's own from 0.27, unless ``model_init_kwargs`` name a dtype. A
reference model is loaded from the same path, from 1.16 in the policy's dtype, before that in float32. What is loaded how is
decided here; `master_weights` carries it out. RLOO took no model of its own before 0.22 and is left alone there.
Delete when: TRL shares a checkpoint's dtype between trainer and engine, with masters for the optimizer.
"""

from __future__ import annotations

import inspect
import logging
import os
from typing import Any

from rlpatch.patching import Patch
from rlpatch.registry import Adapter, Context
from rlpatch.relies import Relies

logger = logging.getLogger("rlpatch")

_CLASSES = (("trl.trainer.grpo_trainer", "GRPOTrainer"), ("trl.trainer.rloo_trainer", "RLOOTrainer"))
_OWNERS = {"DEEPSPEED": "DeepSpeed", "FSDP": "FSDP", "MEGATRON_LM": "Megatron-LM"}


def _name(dtype: Any) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _checkpoint(path: str, config: Any) -> str | None:
    """The dtype that the checkpoint's config names (the text model's, of several)."""
    from transformers import AutoConfig

    arguments = dict(config.model_init_kwargs or {})
    options = {name: arguments[name] for name in ("revision", "trust_remote_code") if name in arguments}
    options.setdefault("trust_remote_code", getattr(config, "trust_remote_code", False))
    try:
        found = AutoConfig.from_pretrained(path, **options)
    except (OSError, ValueError) as error:  # the trainer will say it better
        logger.debug("rlpatch: no config at %s: %s", path, error)
        return None
    for part in (found.get_text_config(), found):
        dtype = getattr(part, "dtype", None) or getattr(part, "torch_dtype", None)
        if dtype is not None:
            return _name(dtype)
    return None


def _owner(config: Any) -> str | None:
    if getattr(config, "deepspeed", None) or getattr(config, "deepspeed_plugin", None):
        return "DeepSpeed"
    if getattr(config, "fsdp", None):
        return "FSDP"
    kind = getattr(getattr(config, "distributed_state", None), "distributed_type", None)
    for variable, owner in (("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("ACCELERATE_USE_FSDP", "FSDP")):
        if os.environ.get(variable, "").lower() in ("1", "true"):
            return owner
    return _OWNERS.get(str(getattr(kind, "value", kind)))


def _cannot_share(context: Context, config: Any) -> str | None:
    if not context.share_weights:
        return "share_weights is off"
    for capability in ("share_weights", "generation"):
        if capability not in context.providers and context.reasons.get(capability):
            return f"nothing is shared: {context.reasons[capability]}"
    size = getattr(config, "vllm_tensor_parallel_size", 1)
    return f"vllm_tensor_parallel_size={size}: nothing is shared" if size > 1 else None


def _facts(context: Context, config: Any, arguments: dict[str, Any]) -> Any:
    from accelerate.utils import is_peft_model

    from rlpatch.precision.choice import Facts

    model = arguments["model"]
    from_path = isinstance(model, str)
    given = dict(config.model_init_kwargs or {})
    chosen = _name(given.get("dtype") or given.get("torch_dtype")) if from_path else None
    floating = (p for p in ([] if from_path else model.parameters()) if p.is_floating_point())
    first = next(iter(floating), None)
    colocated = bool(config.use_vllm) and getattr(config, "vllm_mode", "server") == "colocate"
    optimizer = getattr(config, "optim", "adamw_torch")
    unreachable = None
    if "master_weights" not in context.providers:
        unreachable = context.reasons.get("master_weights") or "master_weights is not applied"
    return Facts(
        from_path=from_path,
        dtype=chosen or _name(getattr(first, "dtype", None)) or "float32",
        chosen=chosen is not None,
        checkpoint=_checkpoint(model, config) if from_path and config.bf16 else None,
        autocast="bfloat16" if config.bf16 else "float16" if config.fp16 else None,
        adapters=arguments.get("peft_config") is not None or (not from_path and bool(is_peft_model(model))),
        colocated=colocated,
        cannot_share=_cannot_share(context, config),
        owner=_owner(config),
        optimizer=str(getattr(optimizer, "value", optimizer)),
        own_optimizer=(arguments.get("optimizers") or (None,))[0] is not None,
        unreachable=unreachable,
    )


def _construct(context: Context, wrapped: Any, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    from rlpatch.precision import model as models
    from rlpatch.precision.choice import AS_IS, BASE, choose

    try:
        arguments = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    except TypeError:  # for the trainer to refuse
        return wrapped(*args, **kwargs)
    config, model = arguments.get("args"), arguments.get("model")
    if config is None or model is None:
        return wrapped(*args, **kwargs)
    facts = _facts(context, config, arguments)
    choice = choose(context.precision, facts)
    level = logging.WARNING if choice.wanted else logging.INFO
    logger.log(level, "rlpatch: precision %s: %s (%s)", choice.mode, choice.reason, choice.cost)
    if choice.mode == AS_IS:
        result = wrapped(*args, **kwargs)
        if facts.colocated:
            models.as_is(trainer.model, choice)
        return result
    late = int(config.world_size) > 1  # DistributedDataParallel reduces the parameters' own gradients
    if facts.from_path:
        plan = models.Loading(model, choice, facts.checkpoint == "bfloat16", late)
        with plan.during():
            result = wrapped(*args, **kwargs)
    else:
        models.convert(model, choice, frozen=choice.mode == BASE, late=late)
        result = wrapped(*args, **kwargs)
    prepared = models.of(trainer.model)
    if prepared is None:
        logger.warning("rlpatch: the model was not loaded through from_pretrained; its precision is as it was")
    else:
        prepared.watch(trainer.model)  # what adapters added: copies of whole modules that are trained
    return result


def _patches(context: Context) -> list[Patch]:
    def construct(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _construct(context, wrapped, instance, args, kwargs)

    return [Patch(module, f"{name}.__init__", construct) for module, name in _CLASSES]


def _probe() -> str | None:
    from trl.trainer.grpo_trainer import GRPOTrainer

    init = GRPOTrainer.__init__
    missing = {"model", "args", "peft_config"} - set(inspect.signature(init).parameters)
    if missing:
        return f"GRPOTrainer takes no {', '.join(sorted(missing))}"
    source = inspect.getsource(init)
    loads = any(name in source for name in ("create_model_from_path(", ".from_pretrained(model"))
    return None if loads else "GRPOTrainer does not load a path where it is looked for"


ADAPTER = Adapter(
    capability="precision",
    library="trl",
    versions=">=0.18,<1.17",
    module="trl.trainer.grpo_trainer",
    probe=_probe,
    patches=_patches,
    relies_on=(Relies("trl.trainer.grpo_trainer:GRPOTrainer.__init__", parameters=("model", "args", "peft_config")),),
)
