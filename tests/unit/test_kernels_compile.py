"""The launches of the project's Triton kernels, compiled for GPUs as the launching code asks for them, and not run.

Triton's interpreter (the tests beside this one) runs kernels without their types and without a GPU's limits; its compiler
needs no GPU. On a GPU: tests/gpu.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

import torch
import triton

from rlpatch.decoding import attention, linear, overlap
from rlpatch.lora import fold_kernel
from rlpatch.lora.target import Product, Target

SHARED_MEMORY = {75: 64 << 10, 80: 163 << 10, 90: 227 << 10}  # bytes that a block can have


class Driver:
    """Stands in for the driver of a GPU that is not there."""

    capability = 90

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


class Launches:
    """Stand in for those of a kernel: each compiles it."""

    def __init__(self, kernel: Any, check: Callable[[Any], None]) -> None:
        self._kernel, self._check = kernel, check

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            self._check(self._kernel.warmup(*arguments, grid=grid, **options))

        return launch


class Compiled:
    """What has been compiled, and for what."""

    def __init__(self) -> None:
        self.driver = Driver()
        self.kernels: list[Any] = []

    def add(self, kernel: Any) -> None:
        assert f".target sm_{self.driver.capability}" in kernel.asm["ptx"] and kernel.asm["cubin"]
        assert kernel.metadata.shared <= SHARED_MEMORY[self.driver.capability]
        self.kernels.append(kernel)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Compiled:
    from rlpatch.decoding import attention_kernel, linear_kernel
    from rlpatch.lora import triton_kernel

    made = Compiled()
    for module, name in (
        (attention_kernel, "decode_kernel"), (linear_kernel, "skinny_kernel"), (triton_kernel, "factors_kernel"),
        (triton_kernel, "fold_kernel"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, Launches(getattr(module, name), made.add))
    monkeypatch.setattr(overlap, "overlaps", lambda device: True)
    monkeypatch.setattr(triton.runtime.driver, "_active", made.driver)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return made


@pytest.mark.parametrize("head", attention.HEADS)
@pytest.mark.parametrize(("sequences", "longest"), [(64, 320), (64, 2176), (32, 2176), (8, 320), (8, 2176)])
def test_attention(compiled: Compiled, head: int, sequences: int, longest: int) -> None:
    how = attention.plan(sequences, 8, head, longest, 132)
    assert how is not None
    pages = -(-longest // 16)
    cache = torch.empty(pages, 2, 16, 8, head, dtype=torch.bfloat16)
    query = torch.empty(sequences, 32, head, dtype=torch.bfloat16)
    table = torch.zeros(sequences, pages, dtype=torch.int32)
    lengths = torch.zeros(sequences, dtype=torch.int32)
    assert attention.attend(query, *cache.unbind(1), table, lengths, 0.1, torch.empty_like(query), how)
    (kernel,) = compiled.kernels
    assert "griddepcontrol.wait" in kernel.asm["ptx"]
    assert ("atom" in kernel.asm["ptx"]) is (how.pieces > 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [False, True])
def test_linear(compiled: Compiled, biased: bool, dtype: Any) -> None:
    weight = torch.empty(256, 1024, dtype=dtype)
    bias = torch.empty(256, dtype=dtype) if biased else None
    for size, tiles in linear.TILES.items():
        for tile in tiles:
            linear.launch(torch.empty(size - 1, 1024, dtype=dtype), weight, bias, size, tile)
    assert len(compiled.kernels) == sum(map(len, linear.TILES.values()))
    assert all("griddepcontrol.wait" in kernel.asm["ptx"] for kernel in compiled.kernels)


@pytest.mark.parametrize("capability", [75, 80, 90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fold(compiled: Compiled, monkeypatch: pytest.MonkeyPatch, capability: int, dtype: Any) -> None:
    compiled.driver.capability = capability
    monkeypatch.setattr(fold_kernel, "_splits", lambda dtype, device: capability >= 80 and dtype.itemsize == 2)
    passes = fold_kernel.TritonPasses()
    whole = torch.zeros(64, 128, dtype=dtype)
    for weight in (whole, whole.T, whole[:61, :99]):
        product = Product(torch.zeros(weight.shape[0], 16), torch.zeros(16, weight.shape[1]), 2.0)
        targets = [Target("a weight", weight, (product,))]
        passes.fold(targets)
        passes.unfold(targets)
        passes.forget()
    assert len(compiled.kernels) == 3 * 2 * 3  # both factors and the weight, there and back
