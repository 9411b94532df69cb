"""A fake of vLLM's C extension ``cumem_allocator`` and of the CUDA driver below it, over ordinary memory.

"Unmapped" memory is full of `POISON` (as floats: NaN), "mapped" memory starts as zeros, so a test sees whether anything was
written to, or computed from, what is not mapped.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

POISON = 0xFF
Chunks = list[tuple[int, int]]  # (slot, size): what ROCm builds take
Handle = tuple[int, int, int, int]


class FakeDriver:
    """What is mapped where, and under which driver handle.

    Attributes:
        capacity: Bytes of the device; None: endless.
        taken: Bytes of it that others hold.
        mapped: address -> (size, driver handle).
        log: ("map" | "unmap", address, size), in order.
        before_map: Called before each ``create_and_map``.
    """

    def __init__(self, capacity: int | None = None) -> None:
        self.capacity, self.taken = capacity, 0
        self.mapped: dict[int, tuple[int, int]] = {}
        self.log: list[tuple[str, int, int]] = []
        self.before_map: Callable[[], None] = lambda: None
        self._handles = 0
        self._slots: list[ctypes.c_uint64] = []

    def used(self) -> int:
        return sum(size for size, _ in self.mapped.values())

    def free(self) -> int:
        return (1 << 50) if self.capacity is None else self.capacity - self.taken - self.used()

    def create_and_map(self, device: int, size: int, address: int, slot: int | Chunks) -> None:
        self.before_map()
        assert size > 0
        for base, (held, _) in self.mapped.items():
            assert address + size <= base or base + held <= address, f"{address:#x} is mapped twice"
        if size > self.free():
            raise RuntimeError("CUDA Error: out of memory at cumem_allocator.cpp:62")
        self._handles += 1
        _number(slot).value = self._handles
        self.mapped[address] = (size, self._handles)
        ctypes.memset(address, 0, size)
        self.log.append(("map", address, size))

    def unmap_and_release(self, device: int, size: int, address: int, slot: int | Chunks) -> None:
        held, handle = self.mapped.pop(address)
        assert held == size, "a mapping goes as it came"
        assert _number(slot).value == handle, "another mapping's handle is in the slot"
        ctypes.memset(address, POISON, size)
        self.log.append(("unmap", address, size))

    def allocate(self, address: int, size: int) -> Handle:
        """The handle of a new allocation of the pool's, mapped."""
        self._slots.append(ctypes.c_uint64())
        handle = (0, size, address, ctypes.addressof(self._slots[-1]))
        self.create_and_map(*handle)
        return handle

    def backed(self, address: int, size: int) -> bytearray:
        """One byte for each of `size` from `address` on: 1 where it is mapped."""
        out = bytearray(size)
        for base, (held, _) in self.mapped.items():
            low, high = max(base, address), min(base + held, address + size)
            if low < high:
                out[low - address : high - address] = b"\1" * (high - low)
        return out


def _number(slot: int | Chunks) -> ctypes.c_uint64:
    return ctypes.c_uint64.from_address(slot if isinstance(slot, int) else slot[0][0])
