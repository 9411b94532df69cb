"""What a person asked for: arguments of ``apply()``, then environment variables, then defaults."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

from rlpatch.compilation import profiles
from rlpatch.errors import UsageError
from rlpatch.memory.sizes import parse_size
from rlpatch.versions import environment_flag

LORA_MODES = ("auto", "fold", "slots", "merge")
PRECISIONS = ("auto", "masters", "as-is")
AUTO = "auto"


@dataclass(frozen=True)
class Settings:
    """Resolved settings.

    Attributes:
        standby: KV cache exists only while tokens are generated.
        share_weights: Trainer and engine hold one copy of the weights.
        defaults: Better defaults for config fields left alone, and batches that divide; the names of those wanted, or
            True for all of them.
        lora: How a LoRA reaches the engine: ``"auto"``, ``"fold"``, ``"slots"`` or ``"merge"`` (TRL's way).
        precision: Of the trainer's weights: ``"auto"``, ``"masters"`` or ``"as-is"`` (TRL's).
        compile: A compile profile, or compile settings with commas between (see `rlpatch.compilation.profiles`).
        memory_plan: A plan sizes the KV cache where the user left vLLM's utilization alone; a number of bytes is the most
            that it may count on.
        park_optimizer: Optimizer state waits in host memory between steps: yes, no, or ``"auto"`` (if the memory plan does
            not fit otherwise).
        expandable_segments: torch's allocator expands its segments: yes, no, or ``"auto"`` (if the memory plan does not fit
            otherwise, or only just).
        one_forward: The loss takes the log-probs that scoring computed, where both are of the same weights.
        include: Only these capabilities, or None for all.
        exclude: Never these capabilities.
        strict: An unsupported release is an error instead of a warning.
        explicit: Names of the settings that were given rather than defaulted.
    """

    standby: bool = True
    share_weights: bool = True
    defaults: bool | tuple[str, ...] = True
    lora: str = "auto"
    precision: str = "auto"
    compile: str = "default"
    memory_plan: bool | int = True
    one_forward: bool = True
    park_optimizer: bool | str = AUTO
    expandable_segments: bool | str = AUTO
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    strict: bool = False
    explicit: frozenset[str] = frozenset()

    def wants(self, capability: str) -> bool:
        """Whether `capability` shall be applied."""
        if capability in self.exclude or (self.include is not None and capability not in self.include):
            return False
        narrow = self.precision != "as-is"
        switches = {
            "standby": self.standby, "share_weights": self.share_weights, "defaults": bool(self.defaults),
            "precision": narrow, "master_weights": narrow, "compile": self.compile != "default",
            "memory_plan": bool(self.memory_plan), "one_forward": self.one_forward,
            "park_optimizer": bool(self.park_optimizer), "load_in_pieces": self.share_weights,
            "expandable_segments": bool(self.expandable_segments),
        }  # fmt: skip
        return switches.get(capability, True)

    def off_by_default(self, capability: str) -> bool:
        """Whether `capability` is off because nobody asked for it, rather than because somebody switched it off."""
        named = {*self.exclude, *(self.include or ())}
        return capability == "compile" and capability not in self.explicit | named


def _names(
    value: Iterable[str] | str | None, origin: str, known: Iterable[str], kind: str = "capability"
) -> tuple[str, ...] | None:
    if value is None:
        return None
    names = tuple(n.strip() for n in (value.split(",") if isinstance(value, str) else value) if n.strip())
    unknown = [name for name in names if name not in set(known)]
    if unknown:
        raise UsageError(
            f"{origin}: unknown {kind} {', '.join(map(repr, unknown))}; known are {', '.join(sorted(known))}"
        )
    return names


def resolve(
    *,
    standby: bool | None,
    share_weights: bool | None,
    defaults: bool | Iterable[str] | str | None,
    lora: str | None,
    precision: str | None = None,
    compile: str | None = None,
    memory_plan: bool | int | str | None = None,
    one_forward: bool | None = None,
    park_optimizer: bool | str | None = None,
    expandable_segments: bool | str | None = None,
    include: Iterable[str] | str | None,
    exclude: Iterable[str] | str | None,
    strict: bool | None,
    known: Iterable[str],
    known_defaults: Iterable[str] = (),
) -> Settings:
    """Merge arguments (None: not given) with ``RLPATCH_*`` variables and defaults.

    ``UNSLOTH_VLLM_STANDBY`` counts as ``RLPATCH_STANDBY`` when the latter is unset: scripts that come from there set it.

    Raises:
        UsageError: a capability or default is unknown, or a value is neither yes nor no; names the argument or variable.
    """
    known, known_defaults = tuple(known), tuple(known_defaults)
    explicit = set()

    def flag(name: str, value: bool | None, default: bool, alias: str | None = None) -> bool:
        if value is not None and not isinstance(value, bool):
            raise UsageError(f"apply({name}={value!r}): expected True, False or None")
        for candidate in (
            value,
            environment_flag(f"RLPATCH_{name.upper()}"),
            environment_flag(alias) if alias else None,
        ):
            if candidate is not None:
                explicit.add(name)
                return candidate
        return default

    def flag_or_auto(name: str, value: bool | str | None) -> bool | str:
        variable = f"RLPATCH_{name.upper()}"
        if value == AUTO or (value is None and os.environ.get(variable) == AUTO):
            explicit.add(name)
            return AUTO
        if isinstance(value, str):
            raise UsageError(f"apply({name}={value!r}): expected True, False, {AUTO!r} or None")
        found = flag(name, value, False)
        return found if name in explicit else AUTO

    def names(name: str, value: Iterable[str] | str | None) -> tuple[str, ...] | None:
        variable = f"RLPATCH_{name.upper()}"
        if value is not None:
            return _names(value, f"apply({name}=…)", known)
        return _names(os.environ.get(variable) or None, variable, known)

    def some(name: str, value: bool | Iterable[str] | str | None) -> bool | tuple[str, ...]:
        """True for all of them, False for none, or the names of some."""
        variable = f"RLPATCH_{name.upper()}"
        origin = f"apply({name}=…)"
        if value is None:
            value, origin = os.environ.get(variable) or None, variable
            if value is None:
                return True
            try:
                value = environment_flag(variable)
            except UsageError:
                pass  # names, then
        explicit.add(name)
        if isinstance(value, bool):
            return value
        if value is None or not isinstance(value, Iterable):
            raise UsageError(f"apply({name}={value!r}): expected True, False, names or None")
        return tuple(sorted(set(_names(value, origin, known_defaults, "default") or ())))

    def one_of(name: str, value: str | None, options: tuple[str, ...]) -> str:
        variable = f"RLPATCH_{name.upper()}"
        for candidate, origin in ((value, f"apply({name}={value!r})"), (os.environ.get(variable) or None, variable)):
            if candidate is None:
                continue
            if candidate not in options:
                raise UsageError(f"{origin}: {candidate!r} is not one of {', '.join(map(repr, options))}")
            explicit.add(name)
            return candidate
        return options[0]

    def compile_settings(value: str | None) -> str:
        variable = "RLPATCH_COMPILE"
        origin = f"apply(compile={value!r})" if value is not None else f"{variable}={os.environ.get(variable)}"
        if value is not None and not isinstance(value, str):
            raise UsageError(f"{origin}: expected a profile or names of settings, as text")
        given = value if value is not None else os.environ.get(variable)
        if not given and value is None:
            return "default"
        explicit.add("compile")
        settings = profiles.named(given or "", origin)
        return given if given in profiles.PROFILES else ",".join(settings)

    def size_or_flag(name: str, value: bool | int | str | None) -> bool | int:
        """True, False, or a size in bytes."""
        variable = f"RLPATCH_{name.upper()}"
        origin = f"apply({name}=…)" if value is not None else variable
        if value is None:
            value = os.environ.get(variable) or None
            if value is None:
                return True
            try:
                value = environment_flag(variable)
            except UsageError:
                pass  # a size, then
        explicit.add(name)
        if isinstance(value, bool):
            return value
        if not isinstance(value, (int, str)):
            raise UsageError(f"{origin}: {value!r}: expected True, False, a size such as '40GiB', or None")
        return parse_size(value, origin)

    included, excluded = names("include", include), names("exclude", exclude) or ()
    both = set(included or ()) & set(excluded)
    if both:
        raise UsageError(f"{', '.join(sorted(both))} is both in include and in exclude; name it in one of them")
    return Settings(
        standby=flag("standby", standby, True, alias="UNSLOTH_VLLM_STANDBY"),
        share_weights=flag("share_weights", share_weights, True),
        defaults=some("defaults", defaults),
        lora=one_of("lora", lora, LORA_MODES),
        precision=one_of("precision", precision, PRECISIONS),
        compile=compile_settings(compile),
        memory_plan=size_or_flag("memory_plan", memory_plan),
        one_forward=flag("one_forward", one_forward, True),
        park_optimizer=flag_or_auto("park_optimizer", park_optimizer),
        expandable_segments=flag_or_auto("expandable_segments", expandable_segments),
        include=included,
        exclude=excluded,
        strict=flag("strict", strict, False),
        explicit=frozenset(explicit),
    )
