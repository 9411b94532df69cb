"""rlpatch: one GPU does the work of two in RL post-training.

``import rlpatch; rlpatch.apply()`` above an ordinary TRL script makes the trainer and a colocated vLLM share one copy of
the weights and lets the KV cache exist only while tokens are generated. Importing rlpatch imports neither torch nor vLLM
nor TRL, and neither does `apply`: what is not imported yet is patched when it comes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from rlpatch.control import Report

__version__ = "0.1.0"
__all__ = ["__version__", "apply", "patched", "revert", "status"]


def apply(
    *,
    standby: bool | None = None,
    share_weights: bool | None = None,
    defaults: bool | None = None,
    lora: str | None = None,
    include: Iterable[str] | str | None = None,
    exclude: Iterable[str] | str | None = None,
    strict: bool | None = None,
) -> Report:
    """Patch the installed vLLM and TRL, now or when they are imported. Applying twice is once.

    Args:
        standby: Release the KV cache's memory whenever no tokens are generated. None: ``RLPATCH_STANDBY``, then
            ``UNSLOTH_VLLM_STANDBY``, then True.
        share_weights: One copy of the weights for trainer and engine. None: ``RLPATCH_SHARE_WEIGHTS``, then True.
        defaults: Config fix-ups for fields left at their default. None: ``RLPATCH_DEFAULTS``, then True.
        lora: How a LoRA reaches the engine. ``"fold"``: folded into the shared weights for each rollout and taken out
            again bit for bit; ``"slots"``: through vLLM's own LoRA kernels; ``"merge"``: TRL's merge, push and unmerge;
            ``"auto"``: the fold where it is exact, else slots, else merge. None: ``RLPATCH_LORA``, then ``"auto"``.
        include: Only these capabilities (names as in `status`). None: ``RLPATCH_INCLUDE`` (comma-separated), then all.
        exclude: Never these. None: ``RLPATCH_EXCLUDE``.
        strict: Releases that no adapter serves are an error. None: ``RLPATCH_STRICT``, then False (a warning).

    Returns:
        What became of each capability, as data; the same that `status` returns.

    Raises:
        rlpatch.errors.UsageError: unknown capability or unusable value; nothing is patched.
        rlpatch.errors.UnsupportedError: under `strict`, or for a capability named in `include`; nothing stays patched.
    """
    from rlpatch import control

    return control.apply(
        standby=standby,
        share_weights=share_weights,
        defaults=defaults,
        lora=lora,
        include=include,
        exclude=exclude,
        strict=strict,
    )


def revert() -> Report:
    """Take every patch out again (the original objects are put back) and part what running trainers share.

    A running trainer gets weights of its own again and its engine's KV cache is restored, so that plain TRL can go on.
    """
    from rlpatch import control

    return control.revert()


def status() -> Report:
    """What was done and why: one outcome per capability, and what each live trainer/engine pair shares."""
    from rlpatch import control

    return control.status()


def patched(**settings: Any) -> AbstractContextManager[Report]:
    """``with rlpatch.patched(...):`` is `apply` on entry and `revert` on exit, with the same arguments as `apply`."""
    from rlpatch import control

    return control.patched(**settings)
