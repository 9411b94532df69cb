"""Checkpoint names for tensors that transformers 5 renamed or fused on load.

transformers 5 loads, e.g., Mixtral's experts into 3-D tensors of another name (``mlp.experts.gate_up_proj``); vLLM's
loaders know the checkpoint's names. ``revert_weight_conversion(model, state_dict)`` (core_model_loading.py) is what
``save_pretrained`` uses to write checkpoints back; applied to one tensor at a time it splits and renames, by views.
Delete when: vLLM's loaders accept transformers' own names for every architecture.
"""

from __future__ import annotations

from typing import Any

from rlpatch.registry import Adapter
from rlpatch.relies import Relies


def checkpoint_names(model: Any) -> Any:
    """A renamer for `model` (see `rlpatch.sharing.share.Sharing`): (name, tensor) → {checkpoint name: view}."""
    from transformers.core_model_loading import revert_weight_conversion

    def rename(name: str, tensor: Any) -> dict[str, Any]:
        try:
            return dict(revert_weight_conversion(model, {name: tensor}))
        except Exception:  # a conversion that needs several tensors at once has no answer for one
            return {name: tensor}

    return rename


def _probe() -> str | None:
    try:
        from transformers.core_model_loading import revert_weight_conversion  # noqa: F401
    except ImportError as error:
        return str(error)
    return None


ADAPTER = Adapter(
    capability="checkpoint_names",
    library="transformers",
    versions=">=5.5,<5.25",
    module="transformers.modeling_utils",
    probe=_probe,
    provides=checkpoint_names,
    relies_on=(
        Relies(
            "transformers.core_model_loading:revert_weight_conversion",
            positional=("model", "state_dict"),
            # one tensor in, its checkpoint's names and views out: every variant from 5.5.0 to 5.23.0 was read
            fingerprints=("455db2cc2c7e", "1d4360b58869", "5d2461d5ba35", "6f491b489b40", "8091f9c8dc85"),
        ),
        Relies(
            "transformers.modeling_utils:PreTrainedModel.save_pretrained",
            contains=("revert_weight_conversion(model_to_save, state_dict)",),
        ),
    ),
)
