"""Which precision the trainer's weights get, decided before the model is loaded, from plain data.

A script that gives TRL a path and ``bf16=True`` trains float32 weights under bf16 autocast, while the engine runs the
checkpoint's bfloat16: two dtypes, hence two copies. Under autocast every matrix is rounded to bfloat16 before it is
multiplied, so the rounded matrices can be the ones that are kept: a frozen base needs nothing else, trained weights
need float32 masters beside them, into which the optimizer's small steps go (https://arxiv.org/abs/1710.03740).
"""

from __future__ import annotations

from dataclasses import dataclass

from rlpatch.errors import UsageError

MODES = ("auto", "masters", "as-is")
MASTERS, BASE, AS_IS = "masters", "base", "as-is"

_COSTS = {
    MASTERS: "per trained parameter 2 bytes (the engine's as well) + 4 master + the optimizer's state (AdamW: 8), and 4 "
    "for the gradient from the backward pass to the step; float32 weights: 4 + 2 in the engine + 8, and 4 + 2 in training",
    BASE: "2 bytes per frozen parameter (the engine's as well); float32 weights: 4 + 2 in the engine, and 2 while training",
    AS_IS: "as in plain TRL",
}

# Optimizers of transformers that write to the parameters themselves, without or beside a step over param_groups.
_WRITES_PARAMETERS = ("lomo", "layerwise", "schedule_free")


@dataclass(frozen=True)
class Facts:
    """What is known when a trainer is about to load its model, or has been given one.

    Attributes:
        from_path: The trainer loads the model itself; else it was given an object.
        dtype: Of the weights when nothing is done: the object's, or what plain TRL loads a path in.
        chosen: The dtype was given by the script (``model_init_kwargs``).
        checkpoint: dtype that the checkpoint's config names, or None.
        autocast: ``"bfloat16"`` or ``"float16"`` under mixed precision, None without.
        adapters: PEFT adapters are trained, or will be.
        colocated: The trainer builds its engine in this process.
        cannot_share: Why its weights could not be shared whatever their dtype, or None.
        owner: Who keeps parameters and optimizer in buffers of its own (``"DeepSpeed"``, ``"FSDP"``), or None.
        optimizer: The trainer's ``optim=``.
        own_optimizer: The script made the optimizer itself.
        unreachable: Why nothing can be done with these releases, or None.
    """

    from_path: bool
    dtype: str = "float32"
    chosen: bool = False
    checkpoint: str | None = None
    autocast: str | None = "bfloat16"
    adapters: bool = False
    colocated: bool = True
    cannot_share: str | None = None
    owner: str | None = None
    optimizer: str = "adamw_torch"
    own_optimizer: bool = False
    unreachable: str | None = None


@dataclass(frozen=True)
class Choice:
    """What becomes of the trainer's weights, and why in one line.

    Attributes:
        mode: ``"masters"``: bfloat16 weights and float32 masters; ``"base"``: a frozen base in bfloat16, adapters as they
            are; ``"as-is"``: what plain TRL does.
        reason: Why.
        wanted: Something else would have been chosen, but for the reason.
    """

    mode: str
    reason: str
    wanted: bool = False

    @property
    def cost(self) -> str:
        """Bytes per parameter, in words."""
        return _COSTS[self.mode]


def choose(wanted: str, facts: Facts) -> Choice:
    """Decide for one trainer.

    Args:
        wanted: The setting, one of `MODES`.

    Raises:
        UsageError: ``"masters"`` was asked for by name and is not possible; nothing is loaded yet.
    """
    if wanted == AS_IS:
        return Choice(AS_IS, "precision='as-is'")
    obstacle = _obstacle(facts)
    if wanted == MASTERS:
        if obstacle is not None:
            why, remedy = obstacle
            raise UsageError(f"precision='masters': {why}; {remedy}, or use precision='as-is'")
        if facts.autocast is None and facts.dtype == "float32":
            raise UsageError(
                "precision='masters': training is in float32 throughout (bf16=False), and bfloat16 weights would change "
                "every result; set bf16=True, or use precision='as-is'"
            )
        return Choice(BASE if facts.adapters else MASTERS, "precision='masters'")
    if not facts.colocated:
        return Choice(AS_IS, "no engine in this process to share weights with")
    if facts.autocast is None:
        return Choice(AS_IS, f"no mixed precision: training is in {facts.dtype} throughout")
    if facts.dtype != "float32" and not facts.chosen and facts.from_path:
        return Choice(AS_IS, f"this TRL loads a path in {facts.dtype}")
    if facts.chosen:
        return Choice(AS_IS, f"dtype={facts.dtype!r} was given in model_init_kwargs")
    if not facts.from_path:
        return Choice(AS_IS, _of_object(facts), wanted=facts.dtype == "float32" and obstacle is None)
    if obstacle is not None:
        return Choice(AS_IS, obstacle[0], wanted=True)
    if facts.cannot_share is not None:
        return Choice(AS_IS, facts.cannot_share, wanted=True)
    if facts.checkpoint == "float16":
        return Choice(
            AS_IS, "the checkpoint is in float16, and so is the engine, while training is in bfloat16", wanted=True
        )
    if not facts.adapters:
        return Choice(MASTERS, "the engine's weights are bfloat16, and so is what autocast multiplies with")
    if facts.checkpoint == "bfloat16":
        return Choice(BASE, "the frozen base keeps the checkpoint's bfloat16, to which autocast would round it")
    return Choice(
        AS_IS,
        f"the checkpoint's config names {facts.checkpoint or 'no dtype'}: precision='masters' rounds its frozen weights to "
        "bfloat16, as the engine does, and shares them",
        wanted=True,
    )


def _obstacle(facts: Facts) -> tuple[str, str] | None:
    """(why masters are out of reach, remedy), or None."""
    if facts.unreachable is not None:
        return facts.unreachable, "install releases that are served (`python -m rlpatch doctor` lists them)"
    if facts.owner is not None:
        return f"{facts.owner} keeps parameters, gradients and optimizer in buffers of its own", "train without it"
    if facts.autocast == "float16":
        return "fp16=True scales its losses, and steps that overflow are skipped by the GradScaler", "use bf16=True"
    if facts.adapters:
        return None  # whatever trains adapters trains them as it did
    for part in _WRITES_PARAMETERS:
        if part in facts.optimizer:
            return (
                f"optim={facts.optimizer!r} writes to the weights itself",
                "choose another, such as optim='adamw_torch'",
            )
    if facts.own_optimizer:
        return (
            "the trainer was given an optimizer that holds the parameters already",
            "let the trainer make it (optim=…, or optimizer_cls_and_kwargs=…)",
        )
    return None


def _of_object(facts: Facts) -> str:
    if facts.dtype != "float32":
        return f"the model was given as an object in {facts.dtype}"
    gain = "2 bytes per frozen parameter beside the engine's copy" if facts.adapters else "the engine's own copy"
    converted = "precision='masters' converts it to bfloat16, shares it and saves"
    return f"the model was given as an object in float32; {converted} {gain}"
