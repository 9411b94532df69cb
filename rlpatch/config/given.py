"""Which settings a config was made with: the arguments of its construction, seen by whoever assigns them.

Upstream's classes are watched through their ``__init__``. A dataclass that a user derives from one has an ``__init__`` of
its own, made after the class exists and before anybody can look; so it gets a ``__new__``, which Python calls with the
same arguments (and which stays behind, without effect, when the patches are taken out: CPython cannot take a ``__new__``
from a class again without breaking it). Copies, unpickled configs and checkpoints call no ``__init__`` and are not seen.

argparse sets every field; `parsing` says which of them were named on the command line or in a file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

_latest = threading.local()
_named: ContextVar[set[str] | None] = ContextVar("rlpatch_named_settings", default=None)


def note(config: Any, init: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Remember what `config` is being made with: ``init(config, *args, **kwargs)`` or its equivalent.

    The last one to note wins: that is the one nearest to where the fields are assigned.
    """
    names = set(kwargs)
    if args:
        try:
            names |= set(inspect.signature(init).bind_partial(config, *args).arguments)
        except TypeError:  # the call fails by itself
            pass
    named = _named.get()
    _latest.config, _latest.names = weakref.ref(config), frozenset(names if named is None else names & named)


def given(config: Any) -> frozenset[str] | None:
    """Names of the settings that `config`, in its ``__post_init__``, was made with; None when nobody saw it."""
    noted = getattr(_latest, "config", None)
    return _latest.names if noted is not None and noted() is config else None


def left_alone(config: Any, upstream: Sequence[str]) -> frozenset[str]:
    """Fields of `config`, in its ``__post_init__``, that were left at a default which upstream chose.

    Neither passed nor assigned since (a user's ``__init__`` or ``__post_init__`` may have), and declared in a module of
    `upstream` (top-level names): a default that a user's own subclass declares is the user's setting.
    """
    passed = given(config)
    if passed is None:
        return frozenset()
    found = set()
    for entry in dataclasses.fields(config):
        if entry.name in passed or entry.default is dataclasses.MISSING:
            continue
        # a subclass that does not declare the field again holds the very same Field
        holders = [c for c in type(config).__mro__ if vars(c).get("__dataclass_fields__", {}).get(entry.name) is entry]
        owner = holders[-1] if holders else type(config)
        if owner.__module__.partition(".")[0] in upstream and getattr(config, entry.name, None) == entry.default:
            found.add(entry.name)
    return frozenset(found)


def watch_subclass(cls: Any) -> None:
    """Let `cls`, which is just being made, note what its instances are made with."""
    if cls.__new__ is not object.__new__:
        return  # a parent watches already, or the class makes its instances in a way of its own

    def __new__(own: Any, *args: Any, **kwargs: Any) -> Any:
        config: Any = object.__new__(own)
        note(config, own.__init__, args, kwargs)
        return config

    cls.__new__ = __new__


@contextlib.contextmanager
def parsing() -> Iterator[set[str]]:
    """Within, only the names added to the set that is yielded count as given, whatever else is passed."""
    named: set[str] = set()
    token = _named.set(named)
    try:
        yield named
    finally:
        _named.reset(token)


def named_by_parser() -> set[str] | None:
    """The set of the innermost `parsing`, or None."""
    return _named.get()
