"""The CUDA driver's calls behind a KV cache's pieces, over a stand-in for libcuda (there is no driver without a GPU)."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from rlpatch.adapters.vllm import _driver

SIZE, ADDRESS, DEVICE = 6 << 20, 0x7F00_0000_0000, 3


class FakeCuda:
    """Notes what is called; `failing` fails with CUDA_ERROR_OUT_OF_MEMORY."""

    def __init__(self, failing: str | None = None) -> None:
        self.failing, self.calls = failing, []  # type: tuple[str | None, list[tuple[Any, ...]]]
        self.created: set[int] = set()
        self.mapped: dict[int, tuple[int, int]] = {}

    def _answer(self, name: str, *arguments: Any) -> int:
        self.calls.append((name, *arguments))
        return 2 if name == self.failing else 0

    def cuMemCreate(self, handle: Any, size: Any, properties: Any, flags: Any) -> int:
        made = properties._obj
        code = self._answer("create", size.value, made.type, made.location.type, made.location.id, made.flags.rdma)
        if not code:
            handle._obj.value = 41
            self.created.add(41)
        return code

    def cuMemMap(self, address: Any, size: Any, offset: Any, handle: Any, flags: Any) -> int:
        assert handle.value in self.created and offset.value == flags.value == 0
        code = self._answer("map", address.value, size.value)
        if not code:
            self.mapped[address.value] = (size.value, handle.value)
        return code

    def cuMemSetAccess(self, address: Any, size: Any, access: Any, count: Any) -> int:
        made = access._obj
        assert self.mapped[address.value][0] == size.value and count.value == 1
        return self._answer("access", made.location.type, made.location.id, made.flags)

    def cuMemUnmap(self, address: Any, size: Any) -> int:
        assert self.mapped.pop(address.value)[0] == size.value
        return self._answer("unmap")

    def cuMemRelease(self, handle: Any) -> int:
        self.created.remove(handle.value)
        return self._answer("release")

    def cuGetErrorString(self, code: int, text: Any) -> int:
        text._obj.value = b"out of memory"
        return 0


@pytest.fixture
def slot() -> Any:
    return ctypes.c_uint64()


def test_the_structures_are_those_of_cuda_h() -> None:
    assert ctypes.sizeof(_driver._Properties) == 32 and ctypes.sizeof(_driver._Access) == 12
    offsets = [getattr(_driver._Properties, name).offset for name, _ in _driver._Properties._fields_]
    assert offsets == [0, 4, 8, 16, 24]


def test_there_and_back(slot: Any) -> None:
    cuda = FakeCuda()
    driver, handle = _driver.Driver(cuda), (DEVICE, SIZE, ADDRESS, ctypes.addressof(slot))
    driver.create_and_map(handle)
    assert cuda.calls == [
        ("create", SIZE, 1, 1, DEVICE, 0),  # pinned memory of that device, not for network cards
        ("map", ADDRESS, SIZE),
        ("access", 1, DEVICE, 3),  # read and write
    ]
    assert slot.value == 41 and cuda.mapped == {ADDRESS: (SIZE, 41)}
    driver.unmap_and_release(handle)
    assert not cuda.mapped and not cuda.created and [call[0] for call in cuda.calls[3:]] == ["unmap", "release"]


@pytest.mark.parametrize(("failing", "name"), [
    ("create", "cuMemCreate"), ("map", "cuMemMap"), ("access", "cuMemSetAccess"),
])  # fmt: skip
def test_a_failure_leaves_nothing_behind(slot: Any, failing: str, name: str) -> None:
    cuda = FakeCuda(failing)
    with pytest.raises(RuntimeError, match=rf"CUDA Error: out of memory \({name}: 2\)"):
        _driver.Driver(cuda).create_and_map((DEVICE, SIZE, ADDRESS, ctypes.addressof(slot)))
    assert not cuda.mapped and not cuda.created and slot.value == 0


def test_a_machine_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    _driver.driver.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert _driver.driver() is None
    _driver.driver.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())  # too old
    assert _driver.driver() is None
    _driver.driver.cache_clear()
