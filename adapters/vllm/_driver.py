"""Device memory for the KV cache, mapped by the CUDA driver itself rather than by vLLM's C extension.

The extension asks for memory that network cards can read (``gpuDirectRDMACapable``), for KV connectors. On an H200, in the
midst of a training, 40 GiB of it in one handle (vLLM from 0.29 on) took 138 to 141 ms, and as much plain memory 3 ms in
handles of 8 GiB and 6 ms in handles of 1 GiB. Size and kind were not varied apart there; outside of a training plain memory
in one handle takes 2 to 17 ms, so that the kind is the likely cause (bench/results/h200-kv-mapping.json). The addresses are
the pool's, reserved for as long as its allocation lives.

The calls and structures are those of the driver's virtual memory management (cuda.h, since CUDA 10.2).
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

Handle = tuple[int, int, int, Any]  # device, bytes, address, address of 8 bytes for the driver's handle

_PINNED, _DEVICE, _READ_WRITE = 1, 1, 3
_SYMBOLS = ("cuMemCreate", "cuMemMap", "cuMemSetAccess", "cuMemUnmap", "cuMemRelease", "cuGetErrorString")


class _Location(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class _Flags(ctypes.Structure):
    _fields_ = [
        ("compression", ctypes.c_ubyte),
        ("rdma", ctypes.c_ubyte),
        ("usage", ctypes.c_ushort),
        ("reserved", ctypes.c_ubyte * 4),
    ]


class _Properties(ctypes.Structure):  # CUmemAllocationProp
    _fields_ = [
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", _Location),
        ("win32", ctypes.c_void_p),
        ("flags", _Flags),
    ]


class _Access(ctypes.Structure):  # CUmemAccessDesc
    _fields_ = [("location", _Location), ("flags", ctypes.c_int)]


class Driver:
    """The driver's calls that back addresses with memory, with the signatures of vLLM's C extension.

    Args:
        library: ``libcuda``, with the functions of `_SYMBOLS`.
    """

    def __init__(self, library: Any) -> None:
        self._library = library

    def create_and_map(self, handle: Handle) -> None:
        """Back the handle's addresses with new memory that its device reads and writes.

        Raises:
            RuntimeError: the driver's error, e.g. out of memory; nothing is left behind.
        """
        device, size, address, slot = handle
        place = _Location(_DEVICE, device)
        properties = _Properties(type=_PINNED, location=place)
        access = _Access(place, _READ_WRITE)
        memory = ctypes.c_uint64()
        bytes_, at = ctypes.c_size_t(size), ctypes.c_uint64(address)
        self._call("cuMemCreate", ctypes.byref(memory), bytes_, ctypes.byref(properties), ctypes.c_ulonglong(0))
        try:
            self._call("cuMemMap", at, bytes_, ctypes.c_size_t(0), memory, ctypes.c_ulonglong(0))
            try:
                self._call("cuMemSetAccess", at, bytes_, ctypes.byref(access), ctypes.c_size_t(1))
            except BaseException:
                self._call("cuMemUnmap", at, bytes_)
                raise
        except BaseException:
            self._call("cuMemRelease", memory)
            raise
        ctypes.c_uint64.from_address(slot).value = memory.value

    def unmap_and_release(self, handle: Handle) -> None:
        """The inverse. Kernels that run meanwhile are not waited for."""
        _, size, address, slot = handle
        self._call("cuMemUnmap", ctypes.c_uint64(address), ctypes.c_size_t(size))
        self._call("cuMemRelease", ctypes.c_uint64(ctypes.c_uint64.from_address(slot).value))

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(code, ctypes.byref(text))
            raise RuntimeError(f"CUDA Error: {(text.value or b'unknown').decode()} ({name}: {code})")


@functools.cache
def driver() -> Driver | None:
    """This machine's driver, or None where it has none that does this."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    return Driver(library) if all(hasattr(library, name) for name in _SYMBOLS) else None
