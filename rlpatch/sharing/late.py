"""Engine weights that come into being one after the other.

vLLM builds the whole model before it fills it: ``torch.empty`` for every parameter, beside the trainer's weights, which
makes two copies for a moment. On a device that holds only one and a bit, a parameter of the engine therefore gives its
memory back as soon as it is registered, and gets it again when something touches it: the loader, which the trainer's
tensors feed one by one, each being freed once the engine has it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

SMALLEST = 1 << 20  # bytes; what is smaller stays
_aten = torch.ops.aten
_EMPTY = (_aten.empty.memory_format, _aten.empty_strided.default)
_HARMLESS = (_aten.detach.default, _aten.alias.default, _aten.empty_like.default)  # look at no memory, check no bounds


class LateMemory(TorchDispatchMode):
    """Around the construction and the filling of a model (a context manager).

    Only memory that is fresh from ``torch.empty`` and that nothing has written to is given back, so that no value is lost.

    Args:
        smallest: Parameters of fewer bytes keep their memory.

    Attributes:
        deferred_bytes: Given back so far, in bytes.
    """

    def __init__(self, smallest: int = SMALLEST) -> None:
        super().__init__()
        self.smallest = smallest
        self.deferred_bytes = 0
        self._fresh: dict[int, StorageWeakRef] = {}  # by address of the storage, which the reference keeps from reuse
        self._late: dict[int, tuple[torch.UntypedStorage, int]] = {}
        self._hook: Any = None

    def __enter__(self) -> Any:
        self._hook = register_module_parameter_registration_hook(self._registered)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._hook.remove()
        if error[0] is None:
            self.finish()

    def finish(self) -> None:
        """Every parameter has its memory from now on; nothing is given back any more."""
        self.smallest = 1 << 62
        self._fresh.clear()
        for key in list(self._late):
            self._allocate(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        shape_alone = (
            func in _HARMLESS or getattr(kwargs.get("device"), "type", None) == "meta"
        )  # vLLM notes its layers
        if not shape_alone and (self._fresh or self._late):
            for value in tree_iter((args, kwargs)):
                if isinstance(value, torch.Tensor) and value.layout is torch.strided:
                    key = value.untyped_storage()._cdata
                    self._fresh.pop(key, None)
                    self._allocate(key)
        result = func(*args, **kwargs)
        if func in _EMPTY and result.device.type != "meta" and result.nbytes >= self.smallest:
            storage = result.untyped_storage()
            self._fresh[storage._cdata] = StorageWeakRef(storage)
        return result

    def _registered(self, module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is None or not self._fresh:
            return
        storage = parameter.untyped_storage()
        if self._fresh.pop(storage._cdata, None) is None:
            return
        size = storage.nbytes()
        self._late[storage._cdata] = (storage, size)
        self.deferred_bytes += size
        storage.resize_(0)

    def _allocate(self, key: int) -> None:
        late = self._late.pop(key, None)
        if late is not None:
            storage, size = late
            storage.resize_(size)


class Crowded(LateMemory):
    """The same on a device that cannot hold trainer and engine at once: what the trainer frees goes back to the device.

    The engine's memory comes from a pool of its own (vLLM's for sleep mode), which cannot use blocks that torch keeps for
    the trainer.

    Args:
        outside: A context in which no such pool is in use; while one is, torch gives nothing back.
    """

    step = 1 << 30  # bytes freed between two such calls, each of which waits for the device

    def __init__(
        self,
        device: torch.device,
        outside: Callable[[], AbstractContextManager[None]] = nullcontext,
        smallest: int = SMALLEST,
    ) -> None:
        super().__init__(smallest)
        self._device = device
        self._outside = outside
        self._freed = self.step  # what is cached now goes first

    def freed(self, size: int) -> None:
        """The trainer has just let go of `size` bytes."""
        self._freed += size
        if self._freed >= self.step and self._device.type != "cpu":
            self._freed = 0
            with self._outside():
                torch.get_device_module(self._device).empty_cache()


def free_bytes(device: torch.device) -> int:
    """What can still be allocated on `device`, in bytes: free, or cached by torch."""
    if device.type == "cpu":
        try:
            with open("/proc/meminfo", encoding="ascii") as lines:
                return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
        except (OSError, StopIteration):  # not Linux: the machine swaps
            return 1 << 62
    module = torch.get_device_module(device)
    return int(module.mem_get_info(device)[0] + module.memory_reserved(device) - module.memory_allocated(device))
