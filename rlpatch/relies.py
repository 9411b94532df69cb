"""What an adapter relies on in the library it adapts, declared beside its patches as data.

`rlpatch.contracts` checks these declarations statically against the released sources of any version; at runtime the
adapter's probe decides. A patch's own target needs no declaration unless more than its existence is relied on.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_TARGET = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*(:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*)?")


@dataclass(frozen=True)
class Relies:
    """One thing of the library that an adapter (or the core rooms on its behalf) touches.

    Args:
        target: ``"package.module"`` or ``"package.module:Class.attribute"``. Imported names and base classes are followed
            inside the library; an instance attribute counts as there when a method assigns ``self.attribute``.
        parameters: Names that the callable accepts (a class: its ``__init__``, or its annotated fields). ``"**"`` stands
            for any other keyword.
        positional: Its first parameters in order, ``self`` left out.
        contains: Expressions or single statements that occur in the code of the target, however they are laid out.
        lacks: The same for what must not occur.
        fingerprints: Accepted fingerprints of the target's normalized code, one per variant that was read
            (``python -m rlpatch matrix check --fingerprints TARGET`` prints them).
        versions: Specifier; only asked of these releases. Empty: of all that the adapter serves.
        otherwise: Alternatives; it is enough when this declaration or one of them holds.
    """

    target: str
    parameters: tuple[str, ...] = ()
    positional: tuple[str, ...] = ()
    contains: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    fingerprints: tuple[str, ...] = ()
    versions: str = ""
    otherwise: tuple[Relies, ...] = ()

    def __post_init__(self) -> None:
        if not _TARGET.fullmatch(self.target):
            raise ValueError(f"target={self.target!r} is neither 'package.module' nor 'package.module:Class.attribute'")
        for field in ("parameters", "positional", "contains", "lacks", "fingerprints", "otherwise"):
            if not isinstance(getattr(self, field), tuple):  # a lone string would be taken for its letters
                raise TypeError(f"{self.target}: {field} must be a tuple; write ({getattr(self, field)!r},)")

    @property
    def module(self) -> str:
        """The part before the colon."""
        return self.target.partition(":")[0]

    @property
    def path(self) -> str:
        """The part after the colon, or an empty string."""
        return self.target.partition(":")[2]

    def __str__(self) -> str:
        return self.target
