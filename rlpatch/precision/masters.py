"""float32 masters behind half-precision parameters, for whatever torch optimizer steps them.

The optimizer's ``param_groups`` hold the masters; the model's parameters are what forward, backward and the engine see.
A parameter's gradient goes into its master's float32 gradient as soon as autograd has accumulated it, and its own is
dropped, so that micro-batches add up in float32; after each step the masters are rounded into the parameters in one
call. Bytes per parameter with AdamW: 2 weight + 4 master + 8 state, + 4 gradient from the first backward pass to the
step, and never while tokens are generated.

``state_dict`` of the model answers with the masters, ``load_state_dict`` fills them, and the optimizer's state is that
of float32 parameters: checkpoints are the ones that training with float32 parameters writes and reads.

Not from a library: torchao, torch-optimi, bitsandbytes, adamw-bf16 and bf16-fused-adam bring half-precision optimizers of
their own (other update rules or states than the ``optim=`` that was asked for), Transformer Engine's FusedAdam and
DeepSpeed's BF16 optimizer likewise; apex's FP16_Optimizer wraps any, but wants its own backward and is not on PyPI.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

HALF = (torch.bfloat16, torch.float16)

_live: weakref.WeakSet[Masters] = weakref.WeakSet()


def substitute(parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The masters in the place of parameters that have one, with all gradients in them: what clipping must see."""
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
        self._step_hooks = [
            optimizer.register_step_pre_hook(lambda *_: self.collect()),
            optimizer.register_step_post_hook(lambda *_: self.round()),
        ]
        if not self.late:
            self._gradient_hooks = [p.register_post_accumulate_grad_hook(self._collect) for p in mine]
        _live.add(self)
        return len(mine)

    @torch.no_grad()
    def _collect(self, parameter: torch.Tensor) -> None:
        gradient, master = parameter.grad, self.master_of(parameter)
        if gradient is None or master is None:
            return
        if master.grad is None:
            master.grad = gradient.to(torch.float32)
        else:
            master.grad.add_(gradient)
        parameter.grad = None

    def collect(self) -> None:
        """Move what gradients the parameters hold into their masters' float32 gradients."""
        for entry in self._entries.values():
            if entry.parameter.grad is not None:
                self._collect(entry.parameter)

    @torch.no_grad()
    def round(self) -> None:
        """After a step: the masters, rounded to nearest, into the parameters (in place: the engine reads them there)."""
        entries = list(self._entries.values())
        for entry in entries:
            entry.master.grad = None  # the trainer clears those of the model's parameters only
        if entries:
            torch._foreach_copy_([e.parameter for e in entries], [e.master for e in entries])

    def _let_go(self) -> None:
        for hook in (*self._step_hooks, *self._gradient_hooks):
            hook.remove()
        self._step_hooks, self._gradient_hooks, self.optimizer = [], [], None

    # ---- the end -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def dissolve(self) -> None:
        """Back to float32 parameters: the masters become the parameters' values, in the optimizer as well."""
        optimizer = self.optimizer
        self._let_go()
        for hook in self._module_hooks:
            hook.remove()
        self._module_hooks.clear()
        self._watched.clear()
        for entry in self._entries.values():
            gradients = [g.to(torch.float32) for g in (entry.parameter.grad, entry.master.grad) if g is not None]
            entry.parameter.grad = None
            entry.parameter.data = entry.master.data
            entry.parameter.grad = sum(gradients[1:], gradients[0]) if gradients else None
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
