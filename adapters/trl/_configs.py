"""TRL's configs with ``num_generations``, and patches that note what each of them is made with.

What the config was made with is noted around ``__init__``, which a dataclass gives it. ``HfArgumentParser`` passes every
field; it is asked a second time, without defaults, which of them were named, and ``TrlParser.set_defaults_with_config``
which its YAML file names. Two adapters need it, either of which may be switched off; where both are there, the inner
wrappers find that the work is being done.
"""

from __future__ import annotations

import argparse
import threading
from typing import Any

from rlpatch.config import given
from rlpatch.patching import Patch
from rlpatch.relies import Relies

# Every config with num_generations of some release between 0.18.0 and 1.16.0. A module that a release does not have is
# never imported there, and its patches stay armed.
CLASSES: tuple[tuple[str, str], ...] = (
    ("trl.trainer.grpo_config", "GRPOConfig"),
    ("trl.trainer.rloo_config", "RLOOConfig"),
    *(
        (f"trl.experimental.{name}.{name}_config", kind)
        for name, kind in (
            ("async_grpo", "AsyncGRPOConfig"),
            ("distillation", "DistillationConfig"),
            ("dppo", "DPPOConfig"),
            ("gfpo", "GFPOConfig"),
            ("gmpo", "GMPOConfig"),
            ("gold", "GOLDConfig"),
            ("grpo_with_replay_buffer", "GRPOWithReplayBufferConfig"),
            ("iw_opd", "IWOPDConfig"),
            ("minillm", "MiniLLMConfig"),
            ("papo", "PAPOConfig"),
            ("sdft", "SDFTConfig"),
            ("sdpo", "SDPOConfig"),
            ("self_distillation", "SelfDistillationConfig"),
            ("server_distillation", "ServerDistillationConfig"),
        )
    ),
)
# TRL has a copy of transformers' parser from 1.0 on
PARSERS = ("transformers.hf_argparser", "trl.scripts._hf_argparser")
UPSTREAM = ("trl", "transformers")
RELIES = tuple(
    Relies(f"transformers.hf_argparser:HfArgumentParser.{name}")
    for name in ("parse_args_into_dataclasses", "parse_known_args")
)

_asking = threading.local()


def _init(wrapped: Any, config: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    given.note(config, getattr(wrapped, "__func__", wrapped), args, kwargs)
    return wrapped(*args, **kwargs)


def _init_subclass(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    result = wrapped(*args, **kwargs)
    cls = wrapped.__self__  # wrapt knows no instance for a classmethod of object
    if cls.__module__.partition(".")[0] not in UPSTREAM:
        given.watch_subclass(cls)
    return result


def _parse(wrapped: Any, parser: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with given.parsing() as named:
        named |= vars(parser).get("_rlpatch_named", set())
        return wrapped(*args, **kwargs)


def _parse_known(wrapped: Any, parser: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    named = given.named_by_parser()
    if named is None or getattr(_asking, "parser", None) is parser:
        return wrapped(*args, **kwargs)
    _asking.parser = parser
    try:
        result = wrapped(*args, **kwargs)
        before = [(action, action.default) for action in parser._actions]
        defaults, parser._defaults = parser._defaults, {}
        try:
            for action, _ in before:
                action.default = argparse.SUPPRESS
            namespace, _ = wrapped(*args[:1], **{**kwargs, "namespace": argparse.Namespace()})
        finally:
            parser._defaults = defaults
            for action, default in before:
                action.default = default
    finally:
        _asking.parser = None
    named |= set(vars(namespace))
    return result


def _parser_defaults(wrapped: Any, parser: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    vars(parser).setdefault("_rlpatch_named", set()).update(kwargs)
    return wrapped(*args, **kwargs)


def watching() -> list[Patch]:
    """Patches under which `rlpatch.config.given` knows what a config was made with."""
    return [
        *(Patch(module, f"{kind}.__init__", _init) for module, kind in CLASSES),
        *(Patch(module, f"{kind}.__init_subclass__", _init_subclass) for module, kind in CLASSES),
        *(Patch(module, "HfArgumentParser.parse_args_into_dataclasses", _parse) for module in PARSERS),
        *(Patch(module, "HfArgumentParser.parse_known_args", _parse_known) for module in PARSERS),
        Patch("trl.scripts.utils", "TrlParser.set_defaults_with_config", _parser_defaults),
    ]
