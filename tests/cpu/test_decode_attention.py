"""What vLLM's FlashAttention backend hands on in a decode step, and which of it is ours.

FlashAttention's kernel and ours cannot run on a CPU and are stood in for; the backend is vLLM's own. The real kernels:
tests/gpu/test_decoding_gpu.py.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from attention_reference import exact  # noqa: E402

from rlpatch.adapters.vllm import decode_attention_v0_17 as adapter  # noqa: E402
from rlpatch.decoding import attention  # noqa: E402
from rlpatch.demo import tiny  # noqa: E402
from rlpatch.patching import PatchSet  # noqa: E402
from rlpatch.registry import Context  # noqa: E402
from rlpatch.versions import installed, within  # noqa: E402

pytestmark = [pytest.mark.cpu, pytest.mark.timeout(600)]

found = installed("vllm").version
if found is None or not within(found, adapter.ADAPTER.versions):
    pytest.skip(f"for vLLM {adapter.ADAPTER.versions}", allow_module_level=True)

SEQUENCES, HEADS, KV_HEADS, HEAD, PAGE, PAGES = 20, 4, 2, 64, 16, 4


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The adapter's patches as on a GPU; collects whose kernel was called."""
    called: list[str] = []
    module = importlib.import_module(adapter.MODULE)

    def theirs(**call: Any) -> None:
        called.append("theirs")
        if call["max_seqlen_q"] == 1:
            rest = (call["block_table"], call["seqused_k"], call["softmax_scale"])
            call["out"].copy_(exact(call["q"], call["k"], call["v"], *rest))

    def attend(*args: Any) -> bool:
        called.append("ours")
        *given, out, _plan = args
        out.copy_(exact(*given))
        return True

    monkeypatch.setattr(module, "flash_attn_varlen_func", theirs, raising=False)
    monkeypatch.setattr(attention, "attend", attend)
    monkeypatch.setattr(attention, "multiprocessors", lambda device: 16)
    monkeypatch.setattr(adapter, "_failed", False)
    monkeypatch.setattr(adapter, "_configs", [])
    patches = PatchSet("as on a GPU", adapter.ADAPTER.patches(Context()))
    patches.apply()
    yield called
    patches.revert()
    assert module.flash_attn_varlen_func is theirs


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.write_model(tmp_path_factory.mktemp("model"), "qwen3"))


@pytest.fixture
def engine(checkpoint: str) -> Callable[..., Any]:
    """The config of an engine whose backend vLLM has built; decode attention knows no more of one."""

    def built(mode: str, dbo: bool = False) -> Any:
        from vllm.config import CUDAGraphMode
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.kv_cache_interface import FullAttentionSpec

        config = EngineArgs(model=checkpoint, max_model_len=64, kv_cache_memory_bytes=1 << 26).create_engine_config()
        config.compilation_config.cudagraph_mode = CUDAGraphMode[mode]
        config.parallel_config.enable_dbo = dbo
        spec = FullAttentionSpec(block_size=PAGE, num_kv_heads=KV_HEADS, head_size=HEAD, dtype=torch.bfloat16)
        builder = importlib.import_module(adapter.MODULE).FlashAttentionMetadataBuilder
        for _ in range(2):  # groups of layers
            builder(spec, [], config, torch.device("cpu"))
        return config

    return built


@pytest.fixture
def forward() -> Callable[..., Any]:
    """A decode step of `SEQUENCES` sequences through ``FlashAttentionImpl.forward``; returns what it wrote."""
    backend = importlib.import_module(adapter.MODULE)
    torch.manual_seed(0)
    shaped = getattr(backend.FlashAttentionBackend, "get_kv_cache_shape", None)  # until 0.29 or so
    sizes = (SEQUENCES * PAGES, PAGE, KV_HEADS, HEAD)
    shape = shaped(*sizes) if shaped is not None else (SEQUENCES * PAGES, KV_HEADS, PAGE, 2 * HEAD)
    cache = torch.randn(shape, dtype=torch.bfloat16)
    query = torch.randn(SEQUENCES, HEADS, HEAD, dtype=torch.bfloat16)
    table = torch.randperm(SEQUENCES * PAGES).view(SEQUENCES, PAGES).int()
    lengths = torch.randint(1, PAGE * PAGES, (SEQUENCES,)).int()

    def step(sequences: int = SEQUENCES, query_len: int = 1, rows: int | None = None, **given: Any) -> Any:
        impl = object.__new__(backend.FlashAttentionImpl)
        usual = {
            "attn_type": "decoder", "kv_cache_dtype": "auto", "vllm_flash_attn_version": 3, "scale": HEAD**-0.5,
            "alibi_slopes": None, "sliding_window": (-1, -1), "logits_soft_cap": 0, "sinks": None, "num_kv_heads": KV_HEADS,
            "head_size": HEAD, "supports_quant_query_input": False, "dcp_world_size": 1, "fa4_hd256": False,
        }  # fmt: skip
        for name, value in {**usual, **given}.items():
            setattr(impl, name, value)
        rows = sequences * query_len if rows is None else rows
        said = {
            "num_actual_tokens": rows, "max_query_len": query_len, "max_seq_len": PAGE * PAGES, "slot_mapping": None,
            "query_start_loc": torch.arange(0, sequences * query_len + 1, query_len).int(), "seq_lens": lengths[:sequences],
            "block_table": table[:sequences], "use_cascade": False, "common_prefix_len": 0, "cu_prefix_query_lens": None,
            "prefix_kv_lens": None, "suffix_kv_lens": None,
        }  # fmt: skip
        known = {field.name for field in dataclasses.fields(backend.FlashAttentionMetadata)}  # no cascades from 0.32
        metadata = backend.FlashAttentionMetadata(**{name: value for name, value in said.items() if name in known})
        layer = SimpleNamespace(_q_scale=torch.ones(1), _k_scale=torch.ones(1), _v_scale=torch.ones(1))
        out = torch.zeros_like(query)
        impl.forward(layer, query[:rows], None, None, cache, metadata, out)
        return out

    return step


def test_a_decode_step_is_ours_and_the_rest_is_theirs(
    flash: list[str], engine: Callable[..., Any], forward: Callable[..., Any]
) -> None:
    config = engine("FULL_AND_PIECEWISE")
    ours = forward()
    assert flash == ["ours"]
    assert torch.equal(forward(sequences=3)[:3], ours[:3])
    assert flash == ["ours", "theirs"]  # too few to fill the device
    for given in (
        {"query_len": 2, "sequences": SEQUENCES // 2},
        {"rows": SEQUENCES - 1},  # a sequence without a query
        {"sliding_window": (31, 0)},
        {"logits_soft_cap": 30.0},
        {"alibi_slopes": torch.ones(HEADS)},
        {"sinks": torch.ones(HEADS)},
        {"vllm_flash_attn_version": 2},
    ):
        flash.clear()
        forward(**given)
        assert flash == ["theirs"], given
    flash.clear()
    forward(sliding_window=None)
    assert flash == ["ours"]
    del config


def test_options_that_nobody_here_knows_are_theirs(
    flash: list[str], engine: Callable[..., Any], forward: Callable[..., Any]
) -> None:
    config = engine("FULL_AND_PIECEWISE")
    seen: list[dict[str, Any]] = []
    module = importlib.import_module(adapter.MODULE)
    real = module.flash_attn_varlen_func
    module.flash_attn_varlen_func = lambda **call: seen.append(call)
    forward()
    module.flash_attn_varlen_func = real
    (call,) = seen
    assert adapter._plain(call) and adapter._plain({**call, "tomorrow": None})
    for change in (
        {"tomorrow": torch.ones(1)},
        {"return_softmax_lse": True},
        {"q": call["q"].float()},
        {"k": call["k"].to(torch.float8_e4m3fn)},
        {"k": call["k"][..., :32], "v": call["v"][..., :32]},
        {"q": call["q"].transpose(1, 2).contiguous().transpose(1, 2)},
        {"block_table": None},
        {"q": torch.zeros(SEQUENCES, 17 * KV_HEADS, HEAD, dtype=torch.bfloat16)},
    ):
        assert not adapter._plain({**call, **change}), change.keys()
    module.flash_attn_varlen_func(**{**call, "return_softmax_lse": True})
    module.flash_attn_varlen_func(**call)
    assert flash == ["theirs", "ours"]
    del config


def test_engines_without_graphs_of_decodes_keep_theirs(
    flash: list[str], engine: Callable[..., Any], forward: Callable[..., Any]
) -> None:
    forward()
    assert flash == ["theirs"]  # an engine that nobody saw: apply() came late
    for mode, dbo, expected in (
        ("FULL_AND_PIECEWISE", False, "ours"),
        ("FULL_DECODE_ONLY", False, "ours"),
        ("FULL", False, "theirs"),  # prompts in the same graphs
        ("PIECEWISE", False, "theirs"),
        ("NONE", False, "theirs"),
        ("FULL_AND_PIECEWISE", True, "theirs"),
    ):
        flash.clear()
        config = engine(mode, dbo)
        forward()
        assert flash == [expected], mode
        assert len([ref for ref in adapter._configs if ref() is not None]) == 1
        del config  # its engine is gone
        gc.collect()
    flash.clear()
    first, second = engine("FULL_DECODE_ONLY"), engine("FULL")
    forward()
    del second
    gc.collect()
    forward()
    assert flash == ["theirs", "ours"]
    del first


def test_batch_invariance_and_failures_leave_theirs(
    flash: list[str],
    engine: Callable[..., Any],
    forward: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from vllm import envs

    config = engine("FULL_AND_PIECEWISE")
    ours = forward()
    with monkeypatch.context() as changed:
        changed.setattr(envs, "VLLM_BATCH_INVARIANT", True, raising=False)
        forward()
    assert flash == ["ours", "theirs"]

    def broken(*args: Any) -> bool:
        raise RuntimeError("no such GPU")

    monkeypatch.setattr(attention, "attend", broken)
    for _ in range(2):
        assert torch.equal(forward(), ours)
    assert flash == ["ours", "theirs", "theirs", "theirs"]
    assert caplog.text.count("FlashAttention's kernel stays: RuntimeError('no such GPU')") == 1
    del config
