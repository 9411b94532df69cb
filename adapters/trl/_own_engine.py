"""Trainers that build their engine themselves: ``self.llm = LLM(…)`` in ``__init__``, a push named
``_move_model_to_vllm``.

GRPO and RLOO until 0.28, GOLD until 1.0, Online DPO and its kin to this day. The engine is built through the name ``LLM``
of the trainer's module, which is wrapped; ``__init__`` is wrapped to know whose engine it is. Around generation nothing
is wrapped here: ``LLM.generate`` and ``LLM.chat`` are (see adapters/vllm/engine_v0_9).
Under ``vllm_enable_sleep_mode`` most of these trainers discard the weights after every generation (``sleep(level=2)``) but
push them only when ``state.global_step`` differs from ``_last_loaded_step``: a second generation in the same step
(gradient accumulation, evaluation) comes from memory that holds nothing (0.25, Online DPO) or, where ``reload_weights``
came between, from the base checkpoint (0.26, 0.27). Weights that are gone are not loaded: ``_last_loaded_step`` says so
again after each such sleep.
"""

from __future__ import annotations

import contextvars
import logging
from collections.abc import Callable
from typing import Any

from rlpatch.adapters.trl import _pairing
from rlpatch.patching import Patch, Wrapper
from rlpatch.registry import Context
from rlpatch.relies import Relies

logger = logging.getLogger("rlpatch")

_constructing: contextvars.ContextVar[Any] = contextvars.ContextVar("rlpatch_constructing", default=None)

_ASKED = "_rlpatch_sleep_mode"  # on TRL's config: what the user asked for, while rlpatch holds the flag


class TrainerView:
    """A trainer that builds its own engine, seen as the ``VLLMGeneration`` of later releases.

    Args:
        trainer: TRL's trainer, within its ``__init__``.
        arguments: What it passes to ``LLM``.
    """

    def __init__(self, trainer: Any, arguments: dict[str, Any]) -> None:
        self._trainer = trainer
        self.model = trainer.model
        self.accelerator = trainer.accelerator
        self.llm: Any = None
        self.tensor_parallel_size = arguments.get("tensor_parallel_size") or 1
        self.gpu_memory_utilization = arguments.get("gpu_memory_utilization")
        self.max_model_length = arguments.get("max_model_len")
        self.model_impl = arguments.get("model_impl")
        self.sampling_config = trainer.args

    def _fix_param_name_to_vllm(self, name: str) -> str:
        fix: Callable[[str], str] | None = getattr(self._trainer, "_fix_param_name_to_vllm", None)
        return fix(name) if fix is not None else name

    def _flag_holders(self) -> list[Any]:
        return [holder for holder in (self._trainer.args, self._trainer) if hasattr(holder, "vllm_enable_sleep_mode")]

    @property
    def enable_sleep_mode(self) -> bool:
        """TRL's flag, as the user gave it: its config may have served another trainer before."""
        return any(getattr(h, _ASKED, None) or h.vllm_enable_sleep_mode for h in self._flag_holders())

    @enable_sleep_mode.setter
    def enable_sleep_mode(self, value: bool) -> None:
        for holder in self._flag_holders():
            setattr(holder, _ASKED, getattr(holder, _ASKED, None) or holder.vllm_enable_sleep_mode)
            holder.vllm_enable_sleep_mode = value


def _build(context: Context, wrapped: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``LLM(…)`` in a trainer's ``__init__``."""
    trainer = _constructing.get()
    if trainer is None or getattr(trainer, "model", None) is None:
        return wrapped(*args, **kwargs)
    from rlpatch import phases

    view = TrainerView(trainer, kwargs)
    loaded = phases.of_trainer(trainer.model)
    if loaded is not None:
        _pairing.take_over(loaded, view)
        trainer._rlpatch_pair = loaded
        return view.llm

    def discarded() -> None:
        trainer._last_loaded_step = -1

    pair = _pairing.new_pair(context, view)
    pair.on_discarded = discarded
    with pair.build(), _pairing.alone(view):
        llm = wrapped(*args, **kwargs)
    trainer._rlpatch_pair = pair
    return llm


def patches(context: Context, module: str, trainer: str, push: Wrapper = _pairing.sync_weights) -> list[Patch]:
    """The patches for the class `trainer` of `module`; `push` goes around its ``_move_model_to_vllm``."""

    def init(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        token = _constructing.set(instance)
        try:
            return wrapped(*args, **kwargs)
        finally:
            _constructing.reset(token)

    def build(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _build(context, wrapped, args, kwargs)

    return [
        Patch(module, f"{trainer}.__init__", init),
        Patch(module, "LLM", build),
        Patch(module, f"{trainer}._move_model_to_vllm", push),
    ]


def relies(module: str, trainer: str) -> tuple[Relies, ...]:
    """What is touched of the class `trainer` of `module`."""
    return (
        Relies(f"{module}:LLM"),
        Relies(f"{module}:{trainer}._move_model_to_vllm"),
        Relies(f"{module}:{trainer}._last_loaded_step"),
        Relies(f"{module}:{trainer}.__init__", contains=("self._last_loaded_step = -1",)),
    )


def missing(module: str, trainer: str) -> str | None:
    """What the class `trainer` of `module` lacks, for probes; None: nothing."""
    import sys

    loaded = sys.modules[module]
    if not hasattr(getattr(loaded, trainer, None), "_move_model_to_vllm"):
        return f"{trainer} has no _move_model_to_vllm"
    return None if hasattr(loaded, "LLM") else f"{module} does not build an engine itself"


def notice(module: str, trainer: str, why: str) -> Patch:
    """A patch for a trainer that rlpatch cannot serve: one line when it builds its engine, which it does as before."""

    def build(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        logger.warning("rlpatch: %s runs as without rlpatch: %s", trainer, why)
        return wrapped(*args, **kwargs)

    return Patch(module, "LLM", build)
