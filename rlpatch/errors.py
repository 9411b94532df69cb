"""What rlpatch raises. Every message names the setting, the value found and the remedy."""

from __future__ import annotations


class RlpatchError(Exception):
    """Base of every error raised by rlpatch."""


class UsageError(RlpatchError, ValueError):
    """A setting, argument or environment variable has a value that cannot be used."""


class PatchError(RlpatchError):
    """A patch target is missing or is not what the adapter relies on; the whole set was rolled back."""


class UnsupportedError(RlpatchError):
    """No adapter serves the installed versions (raised only under ``strict=True`` or for a capability asked by name)."""


class StandbyError(RlpatchError):
    """The KV cache was released or restored out of turn, or its memory could not be had back."""


class SharingError(RlpatchError):
    """Trainer and engine cannot share, or no longer share, one copy of the weights."""


class MatrixError(RlpatchError):
    """compat_matrix.yaml is missing, malformed, or disagrees with tox.ini."""


class FoldError(RlpatchError):
    """A LoRA cannot be folded into its base, or the base could not be brought back bit for bit; names the weight."""


class SourceError(RlpatchError):
    """The released sources of a library cannot be had or read; names the release, where it was sought, and the remedy."""
