"""How an adapter tells the core what its releases call the terms of `rlpatch.compilation.profiles`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Hook:
    """What a patch of the adapter does while a pair's engine is built, where that pair's `Compilation.asks` for it.

    Attributes:
        what: Of the engine, for reports.
        old: How it is without rlpatch.
        new: How it is made.
        missed: Why nothing was changed when the engine is complete and nobody asked.
    """

    what: str
    old: str
    new: str
    missed: str


@dataclass(frozen=True)
class Changes:
    """What one term comes down to in one range of releases.

    Attributes:
        config: Fields of the engine's compilation config.
        inductor: Options of Inductor, kept in one field of that config.
        arguments: Arguments of the engine's constructor.
        environment: Variables, set while the engine is built.
        upon: Options of Inductor that the engine must have set itself; where it has not, nothing is changed.
        unless: Other arguments of the constructor that carry the same wish, or that forbid this one; when one is given, it
            wins.
        hooks: Patches of the adapter's own, by name.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    inductor: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    upon: Mapping[str, Any] = field(default_factory=dict)
    unless: tuple[str, ...] = ()
    hooks: Mapping[str, Hook] = field(default_factory=dict)


@dataclass(frozen=True)
class Surface:
    """The real things that changes are checked against.

    Attributes:
        config: The class of the compilation config, a dataclass.
        arguments: Names that the engine's constructor accepts.
        variables: Environment variables that the engine reads.
        variables_read: It has read them for good; changes come too late.
        inductor_field: The config's field for Inductor's options.
    """

    config: Callable[..., Any]
    arguments: frozenset[str]
    variables: frozenset[str]
    variables_read: bool = False
    inductor_field: str = "inductor_compile_config"


@dataclass(frozen=True)
class Dialect:
    """An adapter's translation of the terms.

    Attributes:
        surface: Looks at the installed library.
        terms: Term -> what it comes down to, as a function of its value; or why it comes to nothing on this machine.
        lacks: Term -> why these releases have nothing of the kind.
    """

    surface: Callable[[], Surface]
    terms: Mapping[str, Callable[[Any], Changes | str]]
    lacks: Mapping[str, str] = field(default_factory=dict)
