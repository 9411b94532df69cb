"""Linear layers of few rows in a real, compiled engine: who gets the operator, what the compile cache is told.

The kernel, its timing and CUDA's dispatch cannot exist on a CPU and are stood in for; the real ones are in
tests/gpu/test_decoding_gpu.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from test_compile_profiles import greedy  # noqa: E402

import rlpatch  # noqa: E402
from rlpatch import phases  # noqa: E402
from rlpatch.adapters.vllm.skinny_linear_v0_17 import ADAPTER, MARK, method  # noqa: E402
from rlpatch.decoding import linear as skinny  # noqa: E402
from rlpatch.demo import tiny, worker  # noqa: E402
from rlpatch.patching import PatchSet  # noqa: E402
from rlpatch.registry import Context  # noqa: E402
from rlpatch.versions import installed, within  # noqa: E402

pytestmark = [pytest.mark.cpu, pytest.mark.timeout(600)]

found = installed("vllm").version
if found is None or not within(found, ADAPTER.versions):
    pytest.skip(f"for vLLM {ADAPTER.versions}", allow_module_level=True)
utils = pytest.importorskip("vllm.model_executor.layers.utils")


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One layer, whose weights a tile can cover."""
    sizes = {"num_hidden_layers": 1, "hidden_size": 128, "intermediate_size": 256, "vocab_size": 256}
    return str(tiny.write_model(tmp_path_factory.mktemp("model"), "qwen3", **sizes))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """The adapter's patches as on a GPU; collects rows and the kernel's size of each launch."""
    seen: list[tuple[int, int]] = []

    def launch(x: Any, weight: Any, bias: Any, size: int, tile: skinny.Tile) -> Any:
        assert tile.fits(*weight.shape)
        seen.append((x.shape[0], size))
        return torch.nn.functional.linear(x, weight, bias)

    def timed(run: Any, weights: Any) -> float:
        before = len(seen)
        run(weights[0])
        faster = len(seen) > before  # by its launch
        del seen[before:]
        return 1.0 if faster else 2.0

    monkeypatch.setattr(skinny, "launch", launch)
    monkeypatch.setattr(skinny, "timed", timed)
    monkeypatch.setattr(skinny, "CHOICES", skinny.Choices())
    monkeypatch.setattr(phases, "CHOICES", skinny.CHOICES)
    monkeypatch.setattr(utils, "default_unquantized_gemm", utils.cpu_unquantized_gemm)
    patches = PatchSet("as on a GPU", ADAPTER.patches(Context()))
    patches.apply()
    yield seen
    patches.revert()


def test_the_engine_computes_the_same_through_the_operator(
    trainer_of: Any, shallow: str, launched: list[tuple[int, int]], collected: None
) -> None:
    job = {"model": shallow, "dtype": "bfloat16"}
    trainer = trainer_of(**job, engine={"enforce_eager": False, "additional_config": {"own": 1}})
    llm = worker.engine_of(trainer)
    found = greedy(trainer)
    assert launched and {size for _, size in launched} == {16}  # 8 sequences at once
    modules = phases.live()[-1].engine.model.modules()
    layers = [m for m in modules if type(getattr(m, "quant_method", None)) is method()]
    assert len(layers) == 4  # qkv, o, gate and up, down; not the head
    config = llm.llm_engine.vllm_config
    assert config.additional_config == {"own": 1, MARK: True}
    known = rlpatch.status().pairs[-1]["skinny_linear"]
    assert {entry["rows"] for entry in known} == {16} and sum(entry["taken"] != "cublas" for entry in known) >= 3
    marked = config.compute_hash()
    config.additional_config = {"own": 1}
    assert config.compute_hash() != marked
    rlpatch.revert()
    count = len(launched)
    trainer = trainer_of(**job, engine={"enforce_eager": True})
    assert greedy(trainer) == found
    assert len(launched) == count and rlpatch.status().pairs[-1]["skinny_linear"] is None


def test_an_engine_that_cannot_be_timed_runs_as_ever(
    trainer_of: Any,
    shallow: str,
    launched: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def timed(run: Any, weights: Any) -> float:
        raise RuntimeError("no clock")

    monkeypatch.setattr(skinny, "timed", timed)
    trainer = trainer_of(model=shallow, dtype="bfloat16", engine={"enforce_eager": False})
    assert all(greedy(trainer)) and not launched
    assert "cuBLAS's kernels stay: RuntimeError('no clock')" in caplog.text
    assert rlpatch.status().pairs[-1]["skinny_linear"] is None


def test_other_engines_are_left_alone(shallow: str, launched: list[tuple[int, int]]) -> None:
    from vllm import LLM

    llm = LLM(shallow, dtype="bfloat16", enforce_eager=True, kv_cache_memory_bytes=64 << 20, max_model_len=64)
    assert MARK not in (llm.llm_engine.vllm_config.additional_config or {})
    assert not launched
