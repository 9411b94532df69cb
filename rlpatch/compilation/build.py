"""The compile settings of one engine: decided against what the user gave, checked, in force while it is built."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from rlpatch.compilation import workers
from rlpatch.compilation.dialect import Changes, Dialect, Hook, Surface
from rlpatch.compilation.profiles import PROFILES, SETTINGS, Reach
from rlpatch.errors import UnsupportedError, UsageError

logger = logging.getLogger("rlpatch")

CONFIG = "compilation_config"


@dataclass
class Entry:
    """One thing that was changed for one engine.

    Attributes:
        setting: Its name in `SETTINGS`.
        what: The field, option, argument or variable.
        old: Value without rlpatch, as text (what vLLM decides itself is ``None``).
        new: Value given.
        became: What vLLM made of it, where that is something else (it knows the device and the model); else None.
    """

    setting: str
    what: str
    old: str
    new: str
    became: str | None = None

    def __str__(self) -> str:
        became = f", which vLLM made {self.became}" if self.became is not None else ""
        return f"{self.what} {self.old} → {self.new}{became} ({self.setting})"


@dataclass
class Compilation:
    """What the compile settings come down to for one engine.

    Attributes:
        name: The profile, or the settings' names with commas between.
        acted: What is changed.
        left: Setting -> why it changes nothing here.
        arguments: For the engine's constructor, in place of what was given.
        environment: Variables for the time of the construction.
        workers: Inductor's compile processes, or None to leave their number.
        inspects_here: The model's class is looked at in this process (the adapter's patch asks).
        hooks: Name -> the setting that wants this patch of the adapter to act, and what it does.
    """

    name: str
    acted: list[Entry] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    workers: int | None = None
    inspects_here: bool = False
    hooks: dict[str, tuple[str, Hook]] = field(default_factory=dict)
    _asked: set[str] = field(default_factory=set)

    def asks(self, hook: str) -> bool:
        """For the adapter's patches, in the engine's construction: whether `hook` shall act. What nobody asks about has
        changed nothing, and is then reported so."""
        if hook not in self.hooks:
            return False
        self._asked.add(hook)
        return True

    @contextlib.contextmanager
    def in_force(self) -> Iterator[None]:
        """Around the engine's construction."""
        logger.info("rlpatch: %s", self)
        os.environ.update(self.environment)  # only variables that were not set
        try:
            with contextlib.ExitStack() as stack:
                if self.workers is not None:
                    stack.enter_context(workers.compile_workers(self.workers))
                yield
        finally:
            for variable in self.environment:
                os.environ.pop(variable, None)

    def settled(self, config: Any) -> None:
        """The engine is complete, and `config` is its compilation config: note what it made of our values, and where it
        never came by."""
        for name, (setting, hook) in self.hooks.items():
            if name not in self._asked:
                self.acted = [entry for entry in self.acted if (entry.setting, entry.what) != (setting, hook.what)]
                self.left[setting] = hook.missed
                logger.info("rlpatch: compile setting %s changed nothing: %s", setting, hook.missed)
        given = self.arguments.get(CONFIG)
        if given is None:
            return
        for entry in self.acted:
            if entry.what.startswith(f"{CONFIG}."):
                name = entry.what.removeprefix(f"{CONFIG}.")
                now = _text(getattr(config, name, None))
                entry.became = now if now != entry.new else None

    def describe(self) -> dict[str, Any]:
        """Plain data for ``status()``."""
        return {
            "profile": self.name,
            "set": [
                {
                    "what": e.what,
                    "old": e.old,
                    "new": e.new,
                    "became": e.became,
                    "why": f"{e.setting}: {_why(e.setting)}",
                }
                for e in self.acted
            ],
            "left": dict(self.left),
        }

    def __str__(self) -> str:
        acted = "; ".join(map(str, self.acted)) or "nothing to set"
        left = "; ".join(f"{name} left alone: {why}" for name, why in self.left.items())
        return f"compile {self.name}: {acted}" + (f"; {left}" if left else "")


def _why(setting: str) -> str:
    return SETTINGS[setting].text


def decide(name: str, names: tuple[str, ...], dialect: Dialect, given: Mapping[str, Any]) -> Compilation:
    """Translate the settings and set them beside what the user gave, which wins.

    Args:
        name: The profile, for reports.
        names: Of `SETTINGS`.
        given: Arguments of the engine's constructor.

    Raises:
        UsageError: the given ``compilation_config`` has a field that this release would drop without a word.
        UnsupportedError: a setting comes down to a field, option, argument or variable that this release does not have.
    """
    surface = dialect.surface()
    made = Compilation(name if name in PROFILES else ",".join(names))
    config = given.get(CONFIG)
    fields = {f.name: f for f in dataclasses.fields(surface.config) if f.init}  # type: ignore[arg-type]
    if isinstance(config, Mapping):
        unknown = sorted(set(config) - set(fields))
        if unknown:
            raise UsageError(
                f"{CONFIG}={{{unknown[0]!r}: …}}: this vLLM's CompilationConfig has no such field and would drop it "
                f"without a word; take it out, or use one of {', '.join(sorted(fields))}"
            )
    reach = Reach(
        given.get("max_num_seqs"), bool(given.get("enable_lora")), workers.cores(), given.get("max_model_len")
    )
    plain: Any = None
    ours: dict[str, Any] = {}
    inductor: dict[str, Any] = {}
    for setting in names:
        wanted = SETTINGS[setting].wants(reach)
        if isinstance(wanted, str):
            made.left[setting] = wanted
            continue
        changes = []
        for term, value in wanted.items():
            if term == "workers":
                why = _no_workers(given) or workers.refusal()
            elif term == "inspect here":
                why = None
            elif term in dialect.terms:
                change = dialect.terms[term](value)
                if isinstance(change, str):
                    why = change
                else:
                    _check(setting, change, surface, fields)
                    changes.append(change)
                    if (change.config or change.inductor) and plain is None:
                        plain = surface.config()
                    why = _already(change, surface, given) or _not_upon(change, surface, plain)
            else:
                why = dialect.lacks.get(term, f"this vLLM has nothing for {term!r}")
            if why is not None:
                made.left[setting] = why
                break
        if setting in made.left:
            continue
        if "workers" in wanted:
            made.workers = wanted["workers"]
            if workers.pinned():
                made.acted.append(Entry(setting, "compile_threads", "1", str(made.workers)))
            else:  # there are several; they are only started sooner
                made.acted.append(Entry(setting, "compile processes start", "when first needed", "with the engine"))
        if "inspect here" in wanted:
            made.inspects_here = True
            made.acted.append(Entry(setting, "model inspection", "in a process of its own", "in this process"))
        for change in changes:
            for what, value in change.config.items():
                made.acted.append(Entry(setting, f"{CONFIG}.{what}", _text(getattr(plain, what)), _text(value)))
            for what, value in change.inductor.items():
                old = getattr(plain, surface.inductor_field).get(what)
                made.acted.append(Entry(setting, f"inductor {what}", _text(old), _text(value)))
            for what, value in change.arguments.items():
                made.acted.append(Entry(setting, what, "None", _text(value)))
                made.arguments[what] = value
            for what, text in change.environment.items():
                made.acted.append(Entry(setting, what, "unset", text))
                made.environment[what] = text
            for what, hook in change.hooks.items():
                made.acted.append(Entry(setting, hook.what, hook.old, hook.new))
                made.hooks[what] = (setting, hook)
            ours.update(change.config)
            inductor.update(change.inductor)
    if ours or inductor:
        merged: dict[str, Any] = {**ours, **(config or {})}
        if inductor:
            merged[surface.inductor_field] = {**inductor, **(merged.get(surface.inductor_field) or {})}
        made.arguments[CONFIG] = surface.config(**merged)
    return made


def _no_workers(given: Mapping[str, Any]) -> str | None:
    return "enforce_eager=True: nothing is compiled" if given.get("enforce_eager") else None


def _already(change: Changes, surface: Surface, given: Mapping[str, Any]) -> str | None:
    """What the user gave that decides the same already, or why it comes too late."""
    config = given.get(CONFIG)
    if change.config or change.inductor:
        if given.get("enforce_eager"):
            return "enforce_eager=True: nothing is compiled or captured"
        if config is not None and not isinstance(config, Mapping):
            return f"{CONFIG} was given as {type(config).__name__}"
        own = config or {}
        taken = [f"{CONFIG}[{what!r}]" for what in change.config if what in own]
        taken += [f"Inductor's {what!r}" for what in change.inductor if what in (own.get(surface.inductor_field) or {})]
        if taken:
            return f"{taken[0]} was given"
    for argument in (*change.arguments, *change.unless):
        if given.get(argument) is not None:
            return f"{argument}= was given"
    for variable, text in change.environment.items():
        if variable in os.environ:
            return f"{variable}={os.environ[variable]} was given" if os.environ[variable] != text else "set already"
        if surface.variables_read:
            return f"this process's first engine has read {variable} for good"
    return None


def _not_upon(change: Changes, surface: Surface, plain: Any) -> str | None:
    for what, value in change.upon.items():
        if getattr(plain, surface.inductor_field).get(what) != value:
            return f"vLLM itself leaves Inductor's {what} alone here"
    return None


def _check(setting: str, change: Changes, surface: Surface, fields: Mapping[str, Any]) -> None:
    """Every name must be one that the installed release has: it ignores others without a word."""
    for what, names, known in (
        ("field of CompilationConfig", change.config, fields),
        ("argument", change.arguments, surface.arguments),
        ("variable", change.environment, surface.variables),
        ("option of Inductor", change.inductor, _inductor_options() if change.inductor else ()),
    ):
        for name in names:
            if name not in known:
                raise UnsupportedError(
                    f"compile setting {setting!r}: this release has no {what} {name!r}, and would ignore it; leave the "
                    "setting out, or apply(compile='default')"
                )


def _inductor_options() -> Any:
    import torch._inductor.config as config

    return config.get_config_copy()  # type: ignore[attr-defined]


def _text(value: Any) -> str:
    return value.name if isinstance(value, enum.Enum) else str(value)
