"""Patches that can be taken back: wrapt wrappers with an undo stack, deferred until their module is imported.

A `Patch` names one callable by module and dotted path; a `PatchSet` is applied whole or not at all. Reverting puts back
the very object that was found (identity-equal). If somebody else has wrapped on top meanwhile, our wrapper cannot be
taken out from under theirs: it is switched off (it then only forwards) and that is reported.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import wrapt

from rlpatch.errors import PatchError

logger = logging.getLogger("rlpatch")

Wrapper = Callable[[Callable[..., Any], Any, tuple[Any, ...], dict[str, Any]], Any]


@dataclass(frozen=True)
class Patch:
    """One wrapper on one callable.

    Args:
        module: Full name of the module that defines it, e.g. ``"vllm.entrypoints.llm"``.
        path: Dotted path inside the module, e.g. ``"LLM.sleep"``; through an object that is no class (a Triton kernel),
            the method of that one object.
        wrapper: Called as ``wrapper(wrapped, instance, args, kwargs)`` (wrapt's convention).
    """

    module: str
    path: str
    wrapper: Wrapper

    def __str__(self) -> str:
        return f"{self.module}:{self.path}"


@dataclass
class _Applied:
    """What `_wrap` did to one attribute, enough to undo it."""

    patch: Patch
    parent: Any
    attribute: str
    original: Any
    inherited: bool
    replacement: Any


@dataclass
class PatchSet:
    """Patches that stand or fall together.

    Attributes:
        state: ``idle`` → ``armed`` (waiting for an import) → ``applied``; or ``failed``; ``reverted`` after `revert`.
        error: The reason when `state` is ``failed``.
    """

    name: str
    patches: Sequence[Patch]
    state: str = "idle"
    error: BaseException | None = None
    on_change: Callable[[PatchSet], None] | None = None
    _undo: list[_Applied] = field(default_factory=list)
    _pending: dict[str, list[Patch]] = field(default_factory=dict)
    _enabled: bool = True
    _lock: Any = field(default_factory=threading.RLock)

    def apply(self) -> None:
        """Wrap what is imported already and arm the rest. Applying twice is once.

        Raises:
            PatchError: a target is missing; everything this set had wrapped is unwrapped again.
        """
        with self._lock:
            if self.state in ("armed", "applied"):
                return
            self._enabled = True
            self.error = None
            for patch in self.patches:
                self._pending.setdefault(patch.module, []).append(patch)
            self.state = "armed" if self._pending else "applied"
            for module in list(self._pending):
                when_imported(module, self._arrived)
            if isinstance(self.error, Exception):
                raise self.error

    def _arrived(self, module: ModuleType) -> None:
        with self._lock:
            patches = self._pending.pop(module.__name__, None)
            if patches is None or self.state != "armed":
                return
            try:
                for patch in patches:
                    self._undo.append(self._wrap(module, patch))
            except Exception as error:
                self._rollback()
                self.state, self.error = "failed", error
            else:
                if not self._pending:
                    self.state = "applied"
        if self.on_change is not None:
            self.on_change(self)

    def _wrap(self, module: ModuleType, patch: Patch) -> _Applied:
        parent: Any = module
        *parts, attribute = patch.path.split(".")
        for part in parts:
            if not hasattr(parent, part):
                raise PatchError(f"{patch.module} has no {'.'.join(parts)!r}: {patch} cannot be wrapped by {self.name}")
            parent = getattr(parent, part)
        original, inherited = _raw_attribute(parent, attribute)
        if original is None or not callable(getattr(parent, attribute, None)):
            raise PatchError(f"{patch} is not a callable of this release: {self.name} cannot be applied")
        replacement = wrapt.FunctionWrapper(original, patch.wrapper, enabled=lambda: self._enabled)
        setattr(parent, attribute, replacement)
        return _Applied(patch, parent, attribute, original, inherited, replacement)

    def _rollback(self) -> list[str]:
        """Undo in reverse order; returns a line for each target that somebody else has wrapped since."""
        self._enabled = False
        self._pending.clear()
        buried = []
        while self._undo:
            done = self._undo.pop()
            current, _ = _raw_attribute(done.parent, done.attribute)
            if current is not done.replacement:
                buried.append(
                    f"{done.patch} was wrapped again by other code; rlpatch's wrapper stays there, switched off"
                )
            elif done.inherited:
                delattr(done.parent, done.attribute)
            else:
                setattr(done.parent, done.attribute, done.original)
        return buried

    def switch(self, on: bool) -> None:
        """While off, what is wrapped, or will be, stays so and only forwards. For measuring; nothing is taken back."""
        with self._lock:
            if self.state not in ("armed", "applied"):
                raise PatchError(f"{self.name} is {self.state}: there is nothing to switch")
            self._enabled = on

    def revert(self) -> list[str]:
        """Put every original back, last wrapped first; returns lines about what could only be switched off."""
        with self._lock:
            if self.state in ("idle", "reverted"):
                return []
            buried = self._rollback()
            self.state = "reverted"
            return buried


def _raw_attribute(parent: Any, attribute: str) -> tuple[Any, bool]:
    """The attribute as stored (descriptors unbound) and whether it is inherited; (None, False) when absent.

    An object that is neither a module nor a class inherits from its class, and what it inherits is bound to it.
    """
    if attribute in vars(parent):
        return vars(parent)[attribute], False
    if not isinstance(parent, (type, ModuleType)):
        return getattr(parent, attribute, None), True
    for base in getattr(parent, "__mro__", ())[1:]:
        if attribute in vars(base):
            return vars(base)[attribute], True
    return None, False


def when_imported(module: str, callback: Callable[[ModuleType], None]) -> None:
    """Call `callback(module)` now if it is fully imported, else right after its import (wrapt post-import hook)."""
    loaded = sys.modules.get(module)
    if loaded is not None and not getattr(getattr(loaded, "__spec__", None), "_initializing", False):
        callback(loaded)
    else:
        wrapt.register_post_import_hook(callback, module)
