"""float32 masters behind half-precision parameters, for whatever torch optimizer steps them.

The optimizer's ``param_groups`` hold the masters; the model's parameters are what forward, backward and the engine see.
A gradient stays what autograd made of it, in half precision, and is widened when the optimizer steps, some hundred MiB of
parameters at a time. Where a second micro-batch comes before that, gradients go into their masters' float32 gradients and
add up there. After each step the masters are rounded into the parameters in one call. Bytes per parameter with AdamW:
2 weight + 4 master + 8 state, + 2 gradient from the backward pass to the step (4 when micro-batches are accumulated), and
none while tokens are generated. The values are those of float32 gradients, whichever way they go: widening is exact.

``state_dict`` of the model answers with the masters, ``load_state_dict`` fills them, and the optimizer's state is that
of float32 parameters: checkpoints are the ones that training with float32 parameters writes and reads.

Not from a library: torchao, torch-optimi, bitsandbytes, adamw-bf16 and bf16-fused-adam bring half-precision optimizers of
their own (other update rules or states than the ``optim=`` that was asked for), Transformer Engine's FusedAdam and
DeepSpeed's BF16 optimizer likewise; apex's FP16_Optimizer wraps any, but wants its own backward and is not on PyPI.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

HALF = (torch.bfloat16, torch.float16)

_live: weakref.WeakSet[Masters] = weakref.WeakSet()

PIECE = 1 << 28  # elements of float32 gradients that a step makes at a time, 1 GiB; at least one tensor


def clip_norm(parameters: Iterable[torch.Tensor], max_norm: float, norm_type: float, clip: Callable[..., Any]) -> Any:
    """Clip by the norm of all gradients, as if they were float32 already; `clip` does it for a list of parameters.

    Gradients that wait in half precision take part by their norms (the norm of all is the norm of these), and are scaled
    when they are widened.
    """
    found, waiting = list(parameters), []
    for masters in list(_live):
        if masters.optimizer is not None:
            waiting += masters.stand_in(found, norm_type)
    total = clip(found)
    if waiting:
        scale = torch.clamp(max_norm / (total.detach() + 1e-6), max=1.0)  # torch.nn.utils.clip_grads_with_norm_
        for masters in waiting:
            masters.scale_by(scale)
    return total


def substitute(parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The masters in the place of parameters that have one, with all gradients in them."""
    found = list(parameters)
    for masters in list(_live):
        if masters.optimizer is not None:
            masters.collect()
            found = [masters.master_of(parameter, parameter) for parameter in found]
    return found


@dataclass
class _Entry:
    parameter: nn.Parameter
    master: nn.Parameter


class Masters:
    """The masters of one model's half-precision trainable parameters.

    Args:
        late: Leave gradients where autograd puts them until the step (``DistributedDataParallel`` reduces them there);
            micro-batches then add up in half precision.
    """

    def __init__(self, late: bool = False) -> None:
        self.late = late
        self.optimizer: torch.optim.Optimizer | None = None
        self._entries: dict[int, _Entry] = {}  # by id of the parameter, which the entry keeps alive
        self._watched: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._module_hooks: list[Any] = []
        self._step_hooks: list[Any] = []
        self._gradient_hooks: list[Any] = []
        self._scale: torch.Tensor | None = None  # of the gradients that wait in half precision

    # ---- masters -----------------------------------------------------------------------------------------------

    def master_of(self, parameter: Any, default: Any = None) -> Any:
        """The float32 master (``nn.Parameter``, the parameter's shape and device), or `default`."""
        entry = self._entries.get(id(parameter))
        return entry.master if entry is not None else default

    @torch.no_grad()
    def adopt(self, parameter: nn.Parameter, value: torch.Tensor | None = None) -> nn.Parameter:
        """Give `parameter` a master, or its master another value.

        Args:
            value: Any floating-point dtype and device. None: the parameter's own. A float32 tensor on the parameter's
                device is kept as it is, not copied.
        """
        source = (parameter if value is None else value).detach()
        entry = self._entries.get(id(parameter))
        if entry is None:
            master = nn.Parameter(source.to(parameter.device, torch.float32), requires_grad=True)
            entry = self._entries[id(parameter)] = _Entry(parameter, master)
        else:
            entry.master.copy_(source)
        return entry.master

    @torch.no_grad()
    def split(self, parameter: nn.Parameter, dtype: torch.dtype) -> None:
        """Make a float32 parameter's values its master, and the parameter their rounding to `dtype`."""
        value = parameter.data
        self.adopt(parameter, value)
        parameter.data = value.to(dtype)

    # ---- the model's checkpoints -------------------------------------------------------------------------------

    def watch(self, model: nn.Module) -> None:
        """Let the state of `model` be read and written through the masters (of parameters that are trained)."""

        # Functions, not bound methods: torch marks the first, and copying a model would copy what a method is bound to.
        def saved(module: nn.Module, state: Any, prefix: str, _: Any) -> None:
            self._saved(module, state, prefix)

        def loading(module: nn.Module, state: Any, prefix: str, *_: Any) -> None:
            self._loading(module, state, prefix)

        for module in model.modules():
            if module not in self._watched and any(_trains(p) for p in module._parameters.values()):
                self._watched.add(module)
                self._module_hooks += [
                    module.register_state_dict_post_hook(saved),
                    module.register_load_state_dict_pre_hook(loading),
                ]

    def _saved(self, module: nn.Module, state: Any, prefix: str) -> None:
        for name, parameter in module._parameters.items():
            master = self.master_of(parameter)
            if master is not None and prefix + name in state:
                state[prefix + name] = master.detach()

    def _loading(self, module: nn.Module, state: Any, prefix: str) -> None:
        for name, parameter in module._parameters.items():
            value = state.get(prefix + name)
            if not isinstance(value, torch.Tensor) or not _trains(parameter) or value.shape != parameter.shape:
                continue
            if id(parameter) in self._entries:
                self.adopt(parameter, value)
            elif value.dtype == torch.float32:  # before the optimizer exists: do not lose what half precision rounds
                self.adopt(parameter, value.clone())

    # ---- the optimizer -----------------------------------------------------------------------------------------

    def attach(self, optimizer: torch.optim.Optimizer) -> int:
        """Put masters in the place of the half-precision parameters in `optimizer`; returns their number.

        Attaching again to the same optimizer does nothing; another one takes over the masters as they are.

        Raises:
            TypeError: `optimizer` is not a ``torch.optim.Optimizer`` with ``param_groups``.
        """
        if optimizer is self.optimizer:
            return len(self._entries)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"{type(optimizer).__module__}.{type(optimizer).__name__} is not a torch.optim.Optimizer")
        mine = [p for group in optimizer.param_groups for p in group["params"] if _trains(p)]
        if not mine:
            return 0
        self._let_go()
        for parameter in mine:
            master = self.master_of(parameter)
            if master is None:
                self.adopt(parameter)
            elif master.device != parameter.device:
                master.data = master.data.to(parameter.device)
        _exchange(optimizer, {id(p): self.master_of(p) for p in mine})
        self.optimizer = optimizer
        vars(optimizer)["zero_grad"] = partial(self._zero_grad, optimizer)
        if self.late:
            self._hook_steps()
        else:
            for parameter in mine:
                self._gradient_hooks += [
                    parameter.register_hook(partial(self._arriving, weakref.ref(parameter))),
                    parameter.register_post_accumulate_grad_hook(self._arrived),
                ]
        _live.add(self)
        return len(mine)

    def _hook_steps(self) -> None:
        assert self.optimizer is not None
        self._step_hooks = [
            self.optimizer.register_step_pre_hook(self._before_step),
            self.optimizer.register_step_post_hook(lambda *_: self.round()),
        ]

    # ---- gradients ---------------------------------------------------------------------------------------------

    def _arriving(self, reference: weakref.ref[torch.Tensor], _: torch.Tensor) -> None:
        """Autograd is about to add a gradient to what `parameter` has."""
        parameter = reference()
        if self._scale is not None:  # clipped, and not stepped
            self.collect()
        elif parameter is not None and parameter.grad is not None:
            self._collect(parameter)

    def _arrived(self, parameter: torch.Tensor) -> None:
        if not self._step_hooks:  # not before: whoever brings the optimizer's state from elsewhere has to come first
            self._hook_steps()
        master = self.master_of(parameter)
        if master is not None and master.grad is not None:
            self._collect(parameter)

    def _wide(self, parameter: torch.Tensor) -> torch.Tensor:
        """The gradient of `parameter` in float32, clipped, in memory of its own."""
        assert parameter.grad is not None
        gradient = parameter.grad.to(torch.float32)
        return gradient if self._scale is None else gradient.mul_(self._scale.to(gradient.device))

    @torch.no_grad()
    def _collect(self, parameter: torch.Tensor) -> None:
        master = self.master_of(parameter)
        if parameter.grad is None or master is None:
            return
        if master.grad is None:
            master.grad = self._wide(parameter)
        elif self._scale is None:
            master.grad.add_(parameter.grad)
        else:
            master.grad.add_(self._wide(parameter))
        parameter.grad = None

    def collect(self) -> None:
        """Move what gradients the parameters hold into their masters' float32 gradients."""
        for entry in self._entries.values():
            if entry.parameter.grad is not None:
                self._collect(entry.parameter)
        self._scale = None

    @torch.no_grad()
    def stand_in(self, parameters: list[torch.Tensor], norm_type: float) -> list[Masters]:
        """Put into `parameters`, for each that has a master, what clipping must see: the master, with its float32 gradient,
        or if all gradients wait in half precision, a number for each whose gradient is the norm of the parameter's.

        Returns:
            This one, if the latter was done.
        """
        mine = [(place, p) for place, p in enumerate(parameters) if self.master_of(p) is not None]
        if self.late or self._scale is not None or any(self.master_of(p).grad is not None for _, p in mine):
            self.collect()
            for place, parameter in mine:
                parameters[place] = self.master_of(parameter)
            return []
        mine = [(place, p) for place, p in mine if p.grad is not None]
        for piece in _pieces(mine, lambda one: one[1].numel()):
            norms = _norms([self._wide(parameter) for _, parameter in piece], norm_type)
            for (place, _), norm in zip(piece, norms, strict=True):
                parameters[place] = nn.Parameter(torch.zeros_like(norm))
                parameters[place].grad = norm
        return [self] if mine else []

    def _zero_grad(self, optimizer: torch.optim.Optimizer, set_to_none: bool = True) -> None:
        """The optimizer's, which knows the masters alone."""
        for entry in self._entries.values():
            entry.parameter.grad = None
        self._scale = None
        type(optimizer).zero_grad(optimizer, set_to_none)

    def scale_by(self, scale: torch.Tensor) -> None:
        """Scale the gradients that wait in half precision, when they are widened."""
        self._scale = scale if self._scale is None else self._scale * scale

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Step for one piece of the parameters after the other; the last is left to the step that called this."""
        closure = [one for one in (*args, *kwargs.values()) if one is not None and one is not optimizer]
        inner = _stepper(optimizer) if not self.late and not closure else None
        waiting = [e for e in self._entries.values() if e.parameter.grad is not None]
        if inner is None or any(e.master.grad is not None for e in self._entries.values()) or not _at_home(optimizer):
            self.collect()
            return
        pieces = list(_pieces(waiting, lambda entry: entry.parameter.numel()))
        others = {p: p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
        for parameter in others:  # not masters: they step once
            parameter.grad = None
        try:
            for number, piece in enumerate(pieces, 1):
                for entry in piece:
                    self._collect(entry.parameter)
                if number < len(pieces):
                    inner(optimizer)
                    for entry in piece:
                        entry.master.grad = None
        finally:
            for parameter, gradient in others.items():
                parameter.grad = gradient

    @torch.no_grad()
    def round(self) -> None:
        """After a step: the masters, rounded to nearest, into the parameters (in place: the engine reads them there)."""
        entries = list(self._entries.values())
        self._scale = None
        for entry in entries:
            entry.master.grad = None  # the trainer clears those of the model's parameters only
        if entries:
            torch._foreach_copy_([e.parameter for e in entries], [e.master for e in entries])

    def _let_go(self) -> None:
        for hook in (*self._step_hooks, *self._gradient_hooks):
            hook.remove()
        if self.optimizer is not None:
            vars(self.optimizer).pop("zero_grad", None)
        self._step_hooks, self._gradient_hooks, self.optimizer = [], [], None

    # ---- the end -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def dissolve(self) -> None:
        """Back to float32 parameters: the masters become the parameters' values, in the optimizer as well."""
        optimizer = self.optimizer
        self.collect()
        self._let_go()
        for hook in self._module_hooks:
            hook.remove()
        self._module_hooks.clear()
        self._watched.clear()
        for entry in self._entries.values():
            entry.parameter.data = entry.master.data
            entry.parameter.grad = entry.master.grad
        if optimizer is not None:
            _exchange(optimizer, {id(e.master): e.parameter for e in self._entries.values()})
        self._entries.clear()
        _live.discard(self)

    def describe(self) -> dict[str, Any]:
        """Numbers of parameters with a master, and bytes that are allocated now."""
        entries = list(self._entries.values())
        gradients = [t.grad for e in entries for t in (e.parameter, e.master) if t.grad is not None]
        state: list[torch.Tensor] = []
        if self.optimizer is not None:
            state = [t for values in self.optimizer.state.values() for t in values.values() if torch.is_tensor(t)]
        return {
            "parameters": sum(e.parameter.numel() for e in entries),
            "weight_bytes": _bytes(e.parameter for e in entries),
            "master_bytes": _bytes(e.master for e in entries),
            "gradient_bytes": _bytes(gradients),
            "optimizer_bytes": _bytes(state),
        }


T = TypeVar("T")


def _pieces(found: Iterable[T], size: Callable[[T], int]) -> Iterator[list[T]]:
    """In order, in lists of up to `PIECE` elements, or of one that is larger."""
    piece: list[T] = []
    elements = 0
    for one in found:
        if piece and elements + size(one) > PIECE:
            yield piece
            piece, elements = [], 0
        piece.append(one)
        elements += size(one)
    if piece:
        yield piece


def _norms(gradients: list[torch.Tensor], norm_type: float) -> list[torch.Tensor]:
    """Of each, as ``torch.nn.utils.clip_grad_norm_`` computes them."""
    if gradients[0].device.type == "cpu":
        return [torch.linalg.vector_norm(gradient, norm_type) for gradient in gradients]
    return list(torch._foreach_norm(gradients, norm_type))


def _stepper(optimizer: torch.optim.Optimizer) -> Callable[[torch.optim.Optimizer], Any] | None:
    """The optimizer's step without hooks, if it treats each parameter by itself and passes over those without a gradient.

    That holds for torch's own but LBFGS, for bitsandbytes' and for transformers' Adafactor; of others nothing is known.
    """
    kind = type(optimizer)
    known = kind.__module__.startswith(("torch.optim.", "bitsandbytes.optim.", "transformers.optimization"))
    step = kind.step
    if not known or isinstance(optimizer, torch.optim.LBFGS) or not getattr(step, "hooked", False):
        return None
    return getattr(step, "__wrapped__", None)


def _at_home(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the state lies where its parameters do (not parked)."""
    return all(
        value.device == parameter.device
        for parameter, state in optimizer.state.items()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.numel() > 1
    )


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _trains(parameter: Any) -> bool:
    return isinstance(parameter, torch.Tensor) and parameter.requires_grad and parameter.dtype in HALF


def _exchange(optimizer: torch.optim.Optimizer, instead: dict[int, nn.Parameter]) -> None:
    """Other parameters in the places of those with these ids, groups, order and state kept."""
    for group in optimizer.param_groups:
        group["params"] = [instead.get(id(p), p) for p in group["params"]]
    for parameter in list(optimizer.state):
        new = instead.get(id(parameter))
        if new is not None:  # some optimizers make state when they are built
            optimizer.state[new] = {
                key: value.to(new.dtype) if torch.is_tensor(value) and value.dtype in HALF else value
                for key, value in optimizer.state.pop(parameter).items()
            }
