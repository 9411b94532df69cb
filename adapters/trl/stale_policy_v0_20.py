"""Tell when GRPO's rollouts come from another policy than the one that is trained.

With ``vllm_importance_sampling_correction`` (0.23 and later, on by default) ``_generate_and_score_completions`` appends the
mean difference of log-probs to ``_metrics["train"]["sampling/sampling_logp_difference/mean"]``, a number on the host: it is
read there, which costs nothing. Without it, ``sampling_per_token_logps`` are in the batch from 0.27 on and
``_compute_loss`` computes the trainer's: the first of each batch of rollouts is compared on the device, in six small
kernels, and the result is read after ``_compute_loss`` has waited for the device itself (it logs ``.item()``s). No forward
pass is added.
Before 0.23 TRL does not ask vLLM for log-probs. RLOO, Online DPO and others do not keep them.
Delete when: TRL itself says so.
"""

from __future__ import annotations

from typing import Any

from rlpatch.patching import Patch
from rlpatch.registry import Adapter, Context
from rlpatch.relies import Relies

_MODULE = "trl.trainer.grpo_trainer"
_METRIC = "sampling/sampling_logp_difference/mean"
_LOGPS = "sampling_per_token_logps"
_TOKENS = 4096  # enough for a mean, and its cost does not grow with the batch


def _pair(trainer: Any) -> Any:
    from rlpatch.adapters.trl import _pairing

    return _pairing.pair_of(getattr(trainer, "vllm_generation", None) or trainer)


def _generate(wrapped: Any, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    before = len(trainer._metrics["train"].get(_METRIC, ()))
    result = wrapped(*args, **kwargs)
    measured = trainer._metrics["train"].get(_METRIC, ())  # an empty list of its own would break TRL's averages
    pair = _pair(trainer)
    if pair is not None and len(measured) > before:
        pair.observe(measured[-1])
    trainer._rlpatch_fresh = pair is not None and trainer.model.training and len(measured) == before
    return result


def _compute_loss(wrapped: Any, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    inputs = kwargs.get("inputs", args[1] if len(args) > 1 else None)
    state = vars(trainer)
    if not state.get("_rlpatch_fresh") or not trainer.model.training or not inputs or _LOGPS not in inputs:
        return wrapped(*args, **kwargs)
    state["_rlpatch_fresh"], state["_rlpatch_batch"] = False, inputs
    try:
        result = wrapped(*args, **kwargs)
    finally:
        state.pop("_rlpatch_batch", None)
        difference = state.pop("_rlpatch_difference", None)
    pair = _pair(trainer)
    if pair is not None and difference is not None:
        pair.observe(difference.item())
    return result


def _logps(wrapped: Any, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    result = wrapped(*args, **kwargs)
    batch = vars(trainer).pop("_rlpatch_batch", None)
    if batch is not None:
        ours, theirs = result[0].detach(), batch[_LOGPS]
        mask = batch["completion_mask"] * batch["tool_mask"] if "tool_mask" in batch else batch["completion_mask"]
        if ours.shape == theirs.shape == mask.shape:
            rows = slice(max(1, _TOKENS // ours.shape[1]))
            ours, theirs, mask = ours[rows], theirs[rows], mask[rows]
            trainer._rlpatch_difference = ((ours - theirs).abs() * mask).nansum() / mask.sum()
    return result


def _patches(context: Context) -> list[Patch]:
    return [
        Patch(_MODULE, "GRPOTrainer._generate_and_score_completions", _generate),
        Patch(_MODULE, "GRPOTrainer._compute_loss", _compute_loss),
        Patch(_MODULE, "GRPOTrainer._get_per_token_logps_and_entropies", _logps),
    ]


def _relevant() -> str | None:
    import inspect
    import sys

    trainer = sys.modules[_MODULE].GRPOTrainer
    if _METRIC not in inspect.getsource(trainer._generate_and_score_completions):
        return "this TRL does not ask vLLM for log-probs"
    return None


ADAPTER = Adapter(
    capability="stale_policy",
    library="trl",
    versions=">=0.20,<1.17",
    module=_MODULE,
    relevant=_relevant,
    patches=_patches,
    relies_on=(
        Relies(f"{_MODULE}:GRPOTrainer._metrics"),
        Relies(f"{_MODULE}:GRPOTrainer._compute_loss", positional=("model", "inputs")),
    ),
)
