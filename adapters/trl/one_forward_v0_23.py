"""One forward pass less per micro-batch: the loss takes the log-probs that scoring computed, with their graph.

With ``vllm_importance_sampling_correction`` (0.23 and later, on by default) ``_generate_and_score_completions`` runs the
whole model without gradients for ``old_per_token_logps``, and ``_compute_loss`` runs it again on the same tokens with the
same weights, where all of a rollout is used within one optimizer step: ``steps_per_generation * num_iterations`` divides
``gradient_accumulation_steps``, TRL's default among others. There scoring is made as the loss would do it (gradients,
autocast, gradient checkpointing) and the loss's pass is not made: a quarter of training's arithmetic, a fifth with
checkpointing.

Scoring sees the rollout in the order of its prompts. Then ``_prepare_inputs`` shuffles it (``shuffle_sequence_dict``, a
``torch.randperm`` of torch's CPU generator) and serves ``steps_per_generation`` micro-batches (``split_tensor_dict``),
one per backward pass. For each to have a graph of its own, scoring foretells that permutation from a copy of the
generator, and scores one micro-batch at a time, in TRL's order; what TRL gets back is in the order it gave. Every row is
compared with what the loss asks for. Where a reward function drew random numbers in between the permutation is another
one: what waits is let go, and the loss runs the model as TRL does.

The first micro-batch takes no memory that its loss would not take. The others' graphs wait for their turn, so they are
kept as far as the memory plan of the trainer's engine has room for them beside training's peak (`Plan.passes_beside`),
with the KV cache released; without a plan only the first is. The first optimizer step is no exception: the plan counts
the optimizer's state before it exists, and when it comes nothing waits any more. Where memory does not suffice all the
same while scoring, what waits is let go, TRL's way is gone, and fewer wait from then on.

Nothing waits beyond an optimizer step, an evaluation, an exception or the end of training; log-probs of weights that have
changed meanwhile are not used. An entropy, an auxiliary loss and the normalization of the loss are of the micro-batch, as
in TRL.

Left alone: a rollout that serves more than one optimizer step, a wrapped model (DDP and its kin count forward passes),
dropout (two passes differ there, by intention or not), images (rows of the same tokens may differ in them), a loss of the
script's own, Liger's fused loss, RLOO (its ratio is of sequences that may be some steps old).
Delete when: TRL does it.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rlpatch.adapters.trl._logps import WAITING, has_images, parted, relied_on
from rlpatch.patching import Patch
from rlpatch.registry import Adapter, Context
from rlpatch.relies import Relies

logger = logging.getLogger("rlpatch")

_MODULE = "trl.trainer.grpo_trainer"
_ARMED = "_rlpatch_score_with_gradients"
_MOST = "_rlpatch_most_waiting"  # there was no memory for more
_TOLD = "_rlpatch_told_of_another_order"


@dataclass(eq=False)
class _Scored:
    """What waits for the loss.

    Attributes:
        model: That scored.
        length: Tokens of the completions.
        weights: See `_weights`.
        batches: Micro-batches in the order in which TRL serves them: ids (rows × tokens), their mask, and what the model's
            pass over them gave, log-probs (rows × `length`) first, with its graph.
    """

    model: Any
    length: int
    weights: tuple[int, int]
    batches: list[tuple[Any, Any, tuple[Any, ...]]]


def _fits(trainer: Any) -> bool:
    import torch
    from trl.trainer.grpo_trainer import GRPOTrainer

    arguments = trainer.args
    own = ("compute_loss", "_compute_loss", "_get_per_token_logps_and_entropies")
    every = arguments.steps_per_generation * trainer.num_iterations
    return (
        all(inspect.getattr_static(type(trainer), name) is inspect.getattr_static(GRPOTrainer, name) for name in own)
        and trainer.model.training
        and arguments.gradient_accumulation_steps % every == 0
        and trainer._step % every == 0  # or TRL serves the last micro-batches of this rollout only
        and trainer.use_vllm
        and trainer.vllm_importance_sampling_correction
        and getattr(trainer, "model_wrapped", trainer.model) is trainer.model
        and not getattr(trainer, "use_liger_loss", False)
        and not getattr(trainer, "use_liger_kernel", False)
        and not any(isinstance(m, torch.nn.modules.dropout._DropoutNd) and m.p > 0 for m in trainer.model.modules())
    )


def _score(wrapped: Any, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    state = vars(trainer)
    state.pop(WAITING, None)  # of a rollout that did not come to its loss
    state[_ARMED] = _fits(trainer)
    try:
        return wrapped(*args, **kwargs)
    except BaseException:
        state.pop(WAITING, None)
        raise
    finally:
        state.pop(_ARMED, None)


def _train(wrapped: Any, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        return wrapped(*args, **kwargs)
    finally:
        for name in (WAITING, _MOST, _TOLD):
            vars(trainer).pop(name, None)


@contextlib.contextmanager
def _checkpointing(trainer: Any) -> Iterator[None]:
    """As in training; TRL switches it off around scoring. transformers 5.24 has a new name for it, and warns of the old."""
    model = trainer.model
    name = "activation_checkpointing" if hasattr(model, "is_activation_checkpointing") else "gradient_checkpointing"
    off = trainer.args.gradient_checkpointing and not getattr(model, f"is_{name}")
    if off:
        getattr(model, f"{name}_enable")(trainer.args.gradient_checkpointing_kwargs)
    try:
        yield
    finally:
        if off:
            getattr(model, f"{name}_disable")()


def _logps(wrapped: Any, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    import torch

    state = vars(trainer)
    scored, others = parted(wrapped, args, kwargs)
    images = has_images(others)
    if torch.is_grad_enabled():
        if images:
            state.pop(WAITING, None)
        found = None if images else _taken(trainer, scored)
        return wrapped(*args, **kwargs) if found is None else found
    # The policy's own comes first; a reference made of the same model with its adapters switched off comes later.
    first = state.get(_ARMED) and not images
    if first:
        state[_ARMED] = False
    batches = _micro_batches(trainer, scored) if first else []
    try:
        if batches:
            return _in_micro_batches(wrapped, trainer, scored, others, batches)
        return wrapped(*args, **kwargs)
    except torch.OutOfMemoryError:
        waiting = state.pop(WAITING, None)
        if waiting is None:
            raise
        count = len(waiting.batches)
        del waiting
    # Not before the exception is gone, and with it what the failed pass had made.
    _make_room(trainer, scored[1].device, count)
    return wrapped(*args, **kwargs)


def _make_room(trainer: Any, device: Any, count: int) -> None:
    """After a pass that found no memory while the graphs of `count` others waited."""
    from rlpatch.standby import make_room

    make_room(device)
    most = vars(trainer)[_MOST] = max(count - 1, 0)
    logger.warning(
        "rlpatch: out of memory in a forward pass while %d others waited for the loss; they are made again, and from now "
        "on %d at the most wait",
        count,
        most,
    )


def _micro_batches(trainer: Any, scored: list[Any]) -> list[Any]:
    """The rows of each micro-batch, in the order in which the loss will get them, if nobody draws random numbers until TRL
    shuffles; none if the rollout cannot be scored like that."""
    import torch

    model, ids = scored[:2]
    steps = trainer.args.steps_per_generation
    if model is not trainer.model or ids.shape[0] % steps or vars(trainer).get(_MOST) == 0:
        return []
    generator = torch.Generator()
    generator.set_state(torch.get_rng_state())
    order = torch.randperm(ids.shape[0], generator=generator, device="cpu").to(ids.device)
    return list(order.split(ids.shape[0] // steps))


def _in_micro_batches(
    wrapped: Any, trainer: Any, scored: list[Any], others: dict[str, Any], batches: list[Any]
) -> tuple[Any, ...]:
    """The scoring pass, `batches` (rows of each) one by one: the first ones as the loss would do it, and kept for it."""
    import torch

    model, ids, mask, length = scored
    graph = {**others, "compute_entropy": True}
    if "compute_aux_loss" in inspect.signature(wrapped).parameters:
        graph["compute_aux_loss"] = trainer.aux_loss_enabled
    kept = _Scored(model, length, _weights(trainer), [])
    vars(trainer)[WAITING] = kept
    found: tuple[Any, ...] = ()
    logps: list[Any] = []
    allowed, before, most = 1, _allocated(ids.device), vars(trainer).get(_MOST, len(batches))
    while len(logps) < allowed:
        rows = batches[len(logps)]
        with torch.enable_grad(), trainer.compute_loss_context_manager(), _checkpointing(trainer):
            found = wrapped(model, ids[rows], mask[rows], length, **graph)
        kept.batches.append((ids[rows], mask[rows], found))
        logps.append(found[0].detach())
        each = (_allocated(ids.device) - before) // len(logps)
        allowed = min(1 + _beside(trainer, ids[rows].numel(), each), most, len(batches))
    if len(logps) < len(batches):
        rest = torch.cat(batches[len(logps) :])
        logps.append(wrapped(model, ids[rest], mask[rest], length, **others)[0])
    order = torch.cat(batches)
    return (torch.cat(logps)[order.argsort()], *(None for _ in found[1:]))


def _allocated(device: Any) -> int:
    import torch

    return int(torch.cuda.memory_allocated(device)) if device.type == "cuda" else 0


def _beside(trainer: Any, tokens: int, each: int) -> int:
    """How many micro-batches of `tokens` tokens may wait beside the one in work, by the plan of the trainer's engine; 0
    without one. `each`: bytes that one was seen to keep."""
    from rlpatch import phases

    for pair in phases.of_parameters(trainer.model):
        made = pair.memory.plan if pair.memory is not None else None
        if made is not None and pair.standby is not None and pair.standby.released:
            return made.passes_beside(tokens, each)
    return 0


def _weights(trainer: Any) -> tuple[int, int]:
    """Which state of the weights this is: optimizer steps so far, and what autograd counts of changes in place."""
    changes = sum(p._version for p in trainer.model.parameters() if not p.is_inference())
    return trainer.state.global_step, changes


def _taken(trainer: Any, scored: list[Any]) -> tuple[Any, ...] | None:
    """What waits for the micro-batch that the loss asks for, which then waits no more, or None: nothing does."""
    import torch

    state = vars(trainer)
    kept = state.get(WAITING)
    if kept is None:
        return None
    ids, mask, found = kept.batches.pop(0)
    rows = None
    if kept.weights == _weights(trainer) and kept.model is scored[0] and kept.length == scored[3]:
        rows = _rows(ids, mask, scored)
        if rows is None and _TOLD not in state:
            state[_TOLD] = True
            logger.info(
                "rlpatch: the loss asks for other completions than were foretold: random numbers of torch's CPU generator "
                "were drawn since they were scored (by a reward function?). The model runs once more on them"
            )
    if rows is None or not kept.batches or trainer.accelerator.sync_gradients:  # the weights change after this one
        del state[WAITING]
    if rows is None:
        return None
    if torch.equal(rows, torch.arange(len(rows), device=rows.device)):
        return found
    return tuple(x[rows] if isinstance(x, torch.Tensor) and x.dim() else x for x in found)


def _rows(ids: Any, mask: Any, scored: list[Any]) -> Any:
    """Which rows of what was scored the loss asks for, or None: it asks for something else."""
    if scored[1].shape != ids.shape:
        return None
    same = ((ids[None] == scored[1][:, None]) & (mask[None] == scored[2][:, None])).all(-1)
    return same.int().argmax(1) if bool(same.any(1).all()) else None


def _patches(context: Context) -> list[Patch]:
    return [
        Patch(_MODULE, "GRPOTrainer._generate_and_score_completions", _score),
        Patch(_MODULE, "GRPOTrainer._get_per_token_logps_and_entropies", _logps),
        Patch("transformers.trainer", "Trainer.train", _train),
    ]


ADAPTER = Adapter(
    capability="one_forward",
    library="trl",
    versions=">=0.23,<1.17",
    module=_MODULE,
    patches=_patches,
    relies_on=(
        relied_on(f"{_MODULE}:GRPOTrainer"),
        Relies(
            f"{_MODULE}:GRPOTrainer._generate_and_score_completions",
            contains=("self.use_vllm and self.vllm_importance_sampling_correction",),
        ),
        Relies(f"{_MODULE}:GRPOTrainer._compute_loss", positional=("model", "inputs")),
        Relies(
            f"{_MODULE}:GRPOTrainer._prepare_inputs",
            contains=(
                "generate_every = self.args.steps_per_generation * self.num_iterations",
                "self._step % generate_every == 0",
                "generation_batch = shuffle_sequence_dict(generation_batch)",
                "generation_batches = split_tensor_dict(generation_batch, self.args.steps_per_generation)",
                "self._buffered_inputs[self._step % self.args.steps_per_generation]",
            ),
        ),
        Relies("trl.trainer.utils:shuffle_sequence_dict", contains=("permutation = torch.randperm(batch_size)",)),
        Relies(
            "trl.trainer.utils:split_tensor_dict",
            contains=(
                "chunk_size = first_tensor.shape[0] // num_chunks",
                "tensor[i * chunk_size : (i + 1) * chunk_size]",
            ),
        ),
    ),
)
