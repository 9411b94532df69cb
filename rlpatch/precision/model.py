"""What a choice of precision means for one model: loaded, given masters, kept at the activations it had, undone.

Autocast rounds matrices before it multiplies, but nothing else. Over float32 weights the embedding's rows, and with them
the residual stream that runs through all layers, are float32; over bfloat16 weights they would be bfloat16 and be rounded
again at every layer. `_keep_residual` widens the embedding's output, so that the stream stays as wide as it was. What
remains different from float32 weights: weights that autocast leaves alone (norms, embeddings) are rounded to bfloat16
between steps, as the engine's are, their gradients are rounded once, and norms of narrow activations (Qwen's q_norm and
k_norm) give bfloat16 where they gave float32.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rlpatch.precision.choice import AS_IS, MASTERS, Choice
from rlpatch.precision.masters import Masters

logger = logging.getLogger("rlpatch")

WEIGHTS = torch.bfloat16  # what autocast multiplies with, and the engine's

_prepared: weakref.WeakKeyDictionary[nn.Module, Prepared] = weakref.WeakKeyDictionary()
_loading: contextvars.ContextVar[Loading | None] = contextvars.ContextVar("rlpatch_precision_loading", default=None)


def loading() -> Loading | None:
    """What the trainer under construction in this thread has decided about the models that it loads, if anything."""
    return _loading.get()


def of(model: Any) -> Prepared | None:
    """What was done to `model`, adapters around it or not."""
    get_base_model = getattr(model, "get_base_model", None)  # a PeftModel's; others have none
    plain = get_base_model() if get_base_model is not None else model
    return _prepared.get(plain) if isinstance(plain, nn.Module) else None


def live() -> list[Prepared]:
    """Every model whose precision was decided and which is still there, oldest first."""
    return sorted(_prepared.values(), key=lambda prepared: prepared.number)


def undo_all() -> None:
    """Give every model back the weights that plain TRL would train (see `Prepared.undo`)."""
    for model, prepared in list(_prepared.items()):
        prepared.undo(model)
        del _prepared[model]


class Prepared:
    """One model's precision.

    Attributes:
        choice: What was decided.
        name: The model's path.
        masters: Of its half-precision trainable parameters; empty until the optimizer exists, or until float32 values are
            known that half precision cannot hold.
    """

    def __init__(self, model: nn.Module, choice: Choice, late: bool = False) -> None:
        self.choice = choice
        self.name = str(getattr(model, "name_or_path", "") or type(model).__name__)
        self.masters = Masters(late)
        # Over a quantized base TRL trains adapters in bfloat16 by choice (https://arxiv.org/abs/2305.14314): as they are
        quantized = getattr(model, "hf_quantizer", None) is not None
        self.uses_masters = choice.mode != AS_IS and not quantized
        self.number: int = 1 + max((prepared.number for prepared in _prepared.values()), default=0)
        self._hooks: list[Any] = []
        _prepared[model] = self

    def describe(self) -> dict[str, Any]:
        """Plain data for ``status()``; bytes are those allocated now."""
        masters = self.masters.describe() if self.masters.optimizer is not None else {}
        choice = self.choice
        return {"model": self.name, "mode": choice.mode, "reason": choice.reason, "cost": choice.cost, **masters}

    # ---- weights -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def narrow(self, model: nn.Module, *, keep: bool) -> None:
        """Round float32 weights of `model` to bfloat16, tensor by tensor; adapters stay as they are.

        Args:
            keep: The exact values of those that are trained become their masters.
        """
        wide = [
            *(getattr(model, "_keep_in_fp32_modules", None) or ()),
            *(getattr(model, "_keep_in_fp32_modules_strict", None) or ()),
        ]
        seen = set()
        for name, parameter in model.named_parameters():
            if parameter.dtype != torch.float32 or id(parameter) in seen:
                continue
            if set(wide) & set(name.split(".")) or "lora_" in name or "modules_to_save" in name:
                continue
            seen.add(id(parameter))
            if keep and parameter.requires_grad:
                self.masters.split(parameter, WEIGHTS)
            else:
                parameter.data = parameter.data.to(WEIGHTS)

    def keep_residual(self, model: nn.Module) -> None:
        """Let the residual stream be float32 under autocast, as it is over float32 weights (see the module's docstring)."""
        embedding: Any = getattr(model, "get_input_embeddings", lambda: None)()
        weight = getattr(embedding, "weight", None)
        if weight is None or weight.dtype != WEIGHTS:
            return
        if weight.device.type == "cpu" and any(isinstance(module, nn.LayerNorm) for module in model.modules()):
            return  # torch's CPU kernel refuses a float32 input beside half-precision weights

        def widen(_: nn.Module, __: Any, output: Any) -> Any:
            if isinstance(output, torch.Tensor) and torch.is_autocast_enabled(output.device.type):
                return output.float()
            return output

        self._hooks.append(embedding.register_forward_hook(widen))

    @property
    def widened(self) -> bool:
        """Whether the residual stream is kept in float32 under autocast (see `keep_residual`)."""
        return bool(self._hooks)

    def watch(self, model: nn.Module) -> None:
        """See `rlpatch.precision.masters.Masters.watch`; again after adapters were put around the model."""
        if self.uses_masters:
            self.masters.watch(model)

    def attach(self, optimizer: Any) -> None:
        """The trainer has made its optimizer: let it step masters."""
        if not self.uses_masters:
            return
        had = self.masters.optimizer
        count = self.masters.attach(optimizer)
        if count and had is None:
            now = self.masters.describe()
            logger.info(
                "rlpatch: %s steps float32 masters of %d tensors (%d parameters): %d MiB weights, %d MiB masters; "
                "gradients exist from the backward pass to the step, which widens them",
                type(optimizer).__name__, count, now["parameters"], now["weight_bytes"] >> 20, now["master_bytes"] >> 20,
            )  # fmt: skip

    def undo(self, model: nn.Module) -> None:
        """Float32 weights again where masters were, and no hooks. A frozen base stays in bfloat16: nothing was lost."""
        while self._hooks:
            self._hooks.pop().remove()
        if self.masters.optimizer is None and self.choice.mode == MASTERS:  # the one to come would step bfloat16
            for parameter in model.parameters():
                if parameter.requires_grad and parameter.dtype == WEIGHTS and self.masters.master_of(parameter) is None:
                    self.masters.adopt(parameter)
        self.masters.dissolve()


@dataclass
class Loading:
    """How the models that a trainer loads while it is built are to be loaded.

    Attributes:
        path: The policy's path; other models (rewards, teachers) are loaded as they would be.
        choice: What was decided: masters, or a frozen base in bfloat16.
        exact: The checkpoint is in bfloat16 already: it is loaded so. Else it is loaded in float32 and rounded, and
            trained weights keep what is rounded away as their masters.
        late: See `rlpatch.precision.masters.Masters`.
    """

    path: str
    choice: Choice
    exact: bool
    late: bool = False
    policy: type | None = None
    prepared: Prepared | None = None

    @contextlib.contextmanager
    def during(self) -> Iterator[None]:
        """Around the trainer's construction."""
        token = _loading.set(self)
        try:
            yield
        finally:
            _loading.reset(token)

    def load(self, kind: type, load: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Load one model of class `kind` from `path`: the first is the policy, others of its class are references.

        Args:
            load: Called with keyword arguments.
            arguments: Those that the trainer gave; a ``dtype`` among them is changed.
        """
        if self.policy not in (None, kind):
            return load(**arguments)
        for key in ("dtype", "torch_dtype"):
            if arguments.get(key) in (torch.float32, "float32", WEIGHTS, "bfloat16"):
                arguments[key] = WEIGHTS if self.exact else torch.float32
        loaded = load(**arguments)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if self.prepared is not None:
            if self.exact:  # a frozen reference has the same values in half the bytes
                self.prepared.narrow(model, keep=False)
                self.prepared.keep_residual(model)
            return loaded
        self.policy = kind
        self.prepared = Prepared(model, self.choice, self.late)
        self.prepared.narrow(model, keep=self.choice.mode == MASTERS and not self.exact)
        self.prepared.keep_residual(model)
        self.prepared.watch(model)
        return loaded


def convert(model: nn.Module, choice: Choice, *, frozen: bool, late: bool) -> Prepared:
    """Prepare a model that the script loaded itself.

    Args:
        frozen: Adapters will be put around it: nothing of it is trained.
    """
    prepared = Prepared(model, choice, late)
    was_wide = any(parameter.dtype == torch.float32 for parameter in model.parameters())
    prepared.narrow(model, keep=choice.mode == MASTERS and not frozen)
    if was_wide:
        prepared.keep_residual(model)
    prepared.watch(model)
    return prepared


def as_is(model: Any, choice: Choice) -> None:
    """Remember, for ``status()``, why nothing was done to `model`."""
    assert choice.mode == AS_IS
    get_base_model = getattr(model, "get_base_model", None)
    plain = get_base_model() if get_base_model is not None else model
    if isinstance(plain, nn.Module) and plain not in _prepared:
        Prepared(plain, choice)
