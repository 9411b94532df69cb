"""One forward pass less per step: the loss takes the log-probs that scoring computed, with their graph.

With ``vllm_importance_sampling_correction`` (0.23 and later, on by default) ``_generate_and_score_completions`` runs the
whole model without gradients for ``old_per_token_logps``, and ``_compute_loss`` runs it again on the same tokens with the
same weights. Where every batch of completions is used for one step (``steps_per_generation * num_iterations == 1``), the
first pass is made as the second would be (gradients, autocast, gradient checkpointing) and the second is not made: a
quarter of training's arithmetic, a fifth with checkpointing. Rows are matched by their tokens, because TRL shuffles them in
between. What training takes at its peak, in the backward pass, stays as it is.

Left alone: a wrapped model (DDP and its kin count forward passes), dropout (two passes differ there, by intention or not),
images (rows of the same tokens may differ in them), a loss of the script's own, Liger's fused loss, RLOO (its ratio is of
sequences that may be some steps old).
Delete when: TRL does it.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

from rlpatch.patching import Patch
from rlpatch.registry import Adapter, Context
from rlpatch.relies import Relies

_MODULE = "trl.trainer.grpo_trainer"
_ARMED, _KEPT = "_rlpatch_score_with_gradients", "_rlpatch_scored"


def _fits(trainer: Any) -> bool:
    import torch
    from trl.trainer.grpo_trainer import GRPOTrainer

    arguments = trainer.args
    own = ("compute_loss", "_compute_loss", "_get_per_token_logps_and_entropies")
    return (
        all(inspect.getattr_static(type(trainer), name) is inspect.getattr_static(GRPOTrainer, name) for name in own)
        and trainer.model.training
        and arguments.steps_per_generation * trainer.num_iterations == 1
        and trainer.use_vllm
        and trainer.vllm_importance_sampling_correction
        and getattr(trainer, "model_wrapped", trainer.model) is trainer.model
        and not getattr(trainer, "use_liger_loss", False)
        and not getattr(trainer, "use_liger_kernel", False)
        and not any(isinstance(m, torch.nn.modules.dropout._DropoutNd) and m.p > 0 for m in trainer.model.modules())
    )


def _score(wrapped: Any, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    state = vars(trainer)
    state.pop(_KEPT, None)  # of a step that did not come to its loss
    state[_ARMED] = _fits(trainer)
    try:
        return wrapped(*args, **kwargs)
    finally:
        state.pop(_ARMED, None)


@contextlib.contextmanager
def _checkpointing(trainer: Any) -> Iterator[None]:
    """As in training; TRL switches it off around scoring."""
    model = trainer.model
    off = trainer.args.gradient_checkpointing and not model.is_gradient_checkpointing
    if off:
        model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    try:
        yield
    finally:
        if off:
            model.gradient_checkpointing_disable()


def _logps(wrapped: Any, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    import torch

    state = vars(trainer)
    kept = state.pop(_KEPT, None) if torch.is_grad_enabled() else None
    # model, ids, mask, length; some releases pass more by position than others
    given = list(inspect.signature(wrapped).bind(*args, **kwargs).arguments.values())
    scored, others = given[:4], given[4:]
    if any(isinstance(value, (torch.Tensor, list, tuple)) for value in others):  # images
        del kept
        return wrapped(*args, **kwargs)
    if torch.is_grad_enabled():
        rows = _rows(kept, scored) if kept is not None else None
        if kept is not None and rows is not None:
            return tuple(x[rows] if isinstance(x, torch.Tensor) and x.dim() else x for x in kept[-1])
        del kept  # its graph is as large as the one that comes
        return wrapped(*args, **kwargs)
    # The policy's own comes first; a reference made of the same model with its adapters switched off comes later.
    if not state.get(_ARMED):
        return wrapped(*args, **kwargs)
    state[_ARMED] = False
    if scored[0] is not trainer.model:
        return wrapped(*args, **kwargs)
    kwargs = {**kwargs, "compute_entropy": True}
    if "compute_aux_loss" in inspect.signature(wrapped).parameters:
        kwargs["compute_aux_loss"] = trainer.aux_loss_enabled
    with torch.enable_grad(), trainer.compute_loss_context_manager(), _checkpointing(trainer):
        found = wrapped(*args, **kwargs)
    state[_KEPT] = (*scored, found)
    return (found[0].detach(), *(None for _ in found[1:]))


def _rows(kept: tuple[Any, ...], scored: list[Any]) -> Any:
    """Which rows of what was scored the loss asks for, or None: it asks for something else."""
    model, ids, mask, length, _ = kept
    if scored[0] is not model or scored[1].shape != ids.shape or scored[3] != length:
        return None
    same = ((ids[None] == scored[1][:, None]) & (mask[None] == scored[2][:, None])).all(-1)
    return same.int().argmax(1) if bool(same.any(1).all()) else None


def _patches(context: Context) -> list[Patch]:
    return [
        Patch(_MODULE, "GRPOTrainer._generate_and_score_completions", _score),
        Patch(_MODULE, "GRPOTrainer._get_per_token_logps_and_entropies", _logps),
    ]


ADAPTER = Adapter(
    capability="one_forward",
    library="trl",
    versions=">=0.23,<1.17",
    module=_MODULE,
    patches=_patches,
    relies_on=(
        Relies(f"{_MODULE}:GRPOTrainer._get_per_token_logps_and_entropies", positional=("model",)),
        Relies(
            f"{_MODULE}:GRPOTrainer._generate_and_score_completions",
            contains=("self.use_vllm and self.vllm_importance_sampling_correction",),
        ),
        Relies(f"{_MODULE}:GRPOTrainer._compute_loss", positional=("model", "inputs")),
    ),
)
