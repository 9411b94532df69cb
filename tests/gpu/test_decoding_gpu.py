"""Kernels of decode steps on a real GPU, against float64, eagerly and in CUDA graphs; and what is chosen."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs CUDA", allow_module_level=True)
pytest.importorskip("triton")

from attention_reference import exact  # noqa: E402

from rlpatch.decoding import attention  # noqa: E402
from rlpatch.decoding import linear as skinny  # noqa: E402

pytestmark = pytest.mark.gpu

CASES = [(size, tile) for size, tiles in skinny.TILES.items() for tile in tiles]


def made(rows: int, columns: int, depth: int, dtype: Any) -> tuple[Any, Any, Any]:
    torch.manual_seed(rows + columns + depth)
    x = torch.randn(rows, depth, device="cuda", dtype=dtype)
    return (
        x,
        torch.randn(columns, depth, device="cuda", dtype=dtype) / depth**0.5,
        torch.randn_like(x[0, :1]).repeat(columns),
    )


def error(found: Any, x: Any, weight: Any, bias: Any = None) -> float:
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    return float((found.double() - exact).abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("size", "tile"), CASES)
def test_every_tile(size: int, tile: skinny.Tile, dtype: Any) -> None:
    for rows in (1, size - 1, size):
        for columns, depth in ((128, 256), (4096, 4096), (1024, 12288)):
            x, weight, bias = made(rows, columns, depth, dtype)
            for given in (None, bias):
                found = skinny.launch(x, weight, given, size, tile)
                assert found.shape == (rows, columns) and found.dtype is dtype
                assert (
                    error(found, x, weight, given)
                    <= 1.01 * error(torch.nn.functional.linear(x, weight, given), x, weight, given) + 1e-3
                )


def test_a_chain_in_a_graph_is_the_chain() -> None:
    """Each product is launched before the one that it reads has ended, where the GPU can do that."""
    tile = skinny.Tile(32, 128, 6)
    weights = [made(1, 2048, 2048, torch.bfloat16)[1] for _ in range(24)]
    start = made(8, 2048, 2048, torch.bfloat16)[0]

    def chain(product: Any) -> Any:
        x = start
        for weight in weights:
            x = product(x, weight) + x
        return x

    def ours(x: Any, weight: Any) -> Any:
        return skinny.launch(x, weight, None, 16, tile)

    eager = chain(ours)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain(ours)
    for _ in range(20):
        start.copy_(torch.randn_like(start))
        graph.replay()
        torch.cuda.synchronize()
        replayed = captured.clone()
        assert torch.equal(replayed, chain(ours))
        reference = chain(torch.nn.functional.linear)
        assert (replayed - reference).abs().max() <= 0.05 * reference.abs().max()
    assert eager.shape == start.shape


def test_the_operator_takes_what_was_chosen_and_leaves_the_rest() -> None:
    skinny.register()
    choices = skinny.CHOICES
    weights = [made(1, 4096, 4096, torch.bfloat16)[1] for _ in range(14)]
    keys = choices.tune(weights, 8)
    assert [size for _, size in keys] == [16]
    assert all(seconds is not None and 1e-6 < seconds < 1e-3 for seconds in choices.seconds[keys[0]])
    assert choices.tune(weights, 8) == keys
    x, weight, bias = made(40, 4096, 4096, torch.bfloat16)
    assert torch.equal(torch.ops.rlpatch.skinny_linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))
    assert error(torch.ops.rlpatch.skinny_linear(x[:8], weight, bias), x[:8], weight, bias) < 0.05
    assert torch.ops.rlpatch.skinny_linear(x[:0], weight, None).shape == (0, 4096)
    assert torch.ops.rlpatch.skinny_linear(x[:, ::2], weight[:, ::2], None).shape == (40, 4096)  # not contiguous


def test_what_no_tile_covers_is_left() -> None:
    weights = [made(1, 1000, 250, torch.bfloat16)[1]]
    keys = skinny.CHOICES.tune(weights, 64)
    assert len(keys) == 3 and all(skinny.CHOICES.seconds[key][2] is None for key in keys)
    x, weight, _ = made(40, 1000, 250, torch.bfloat16)
    skinny.CHOICES.taken[keys[2]] = skinny.LT
    skinny.CHOICES.zeros[keys[2][0]] = torch.zeros(1000, dtype=torch.bfloat16, device="cuda")
    assert error(torch.ops.rlpatch.skinny_linear(x, weight, None), x, weight) < 0.05


# ---- attention ----


def sequences(
    lengths: list[int], most: int, heads: int, kv_heads: int, head: int, dtype: Any, layout: str
) -> dict[str, Any]:
    """Pages in disorder; what lies behind a context, and the page that is nobody's, is not a number."""
    torch.manual_seed(len(lengths) + heads)
    count, page = len(lengths), 16
    pages = -(-most // page)
    table = torch.randperm(count * pages, device="cuda").view(count, pages).int() + 1
    whole = count * pages + 1
    if layout == "by page":
        keys, values = torch.randn(whole, 2, page, kv_heads, head, dtype=dtype, device="cuda").unbind(1)
    elif layout == "by head":
        both = torch.randn(whole, kv_heads, page, 2 * head, dtype=dtype, device="cuda")
        keys, values = both.transpose(1, 2).split(head, dim=-1)
    else:
        keys, values = torch.randn(2, whole, page, kv_heads, head, dtype=dtype, device="cuda")
    keys[0] = values[0] = float("nan")
    for row, length in enumerate(lengths):
        for at in range(length, pages * page):
            if at // page > length // page + 1:
                break
            for cache in (keys, values):
                cache[table[row, at // page], at % page] = float("nan")
    query = torch.randn(count, heads + 2, head, dtype=dtype, device="cuda")[:, :heads]
    return {
        "query": query,
        "keys": keys,
        "values": values,
        "table": table,
        "lengths": torch.tensor(lengths, dtype=torch.int32, device="cuda"),
        "scale": head**-0.5,
        "out": torch.full_like(query, float("nan"), memory_format=torch.contiguous_format),
    }


def reference(case: dict[str, Any]) -> Any:
    return exact(**{name: value for name, value in case.items() if name != "out"})


LENGTHS = [0, 1, 2, 63, 64, 65, 127, 128, 129, 500, 1023, 1024, 1025, 2100, 2176]
PLANS = [
    attention.Plan(64, 3, 1024, 3),
    attention.Plan(128, 2, 1024, 3),
    attention.Plan(64, 3, 2176),
    attention.Plan(64, 3, 64, 34),
    attention.Plan(256, 3, 256, 9),
]


@pytest.mark.parametrize("how", PLANS, ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head"), [(32, 8, 128), (28, 4, 128), (16, 1, 64), (8, 8, 128), (40, 8, 64)]
)
@pytest.mark.parametrize("layout", ["by page", "by head", "apart"])
def test_attention(how: attention.Plan, heads: int, kv_heads: int, head: int, layout: str) -> None:
    if how.tile > 16384 // head:
        pytest.skip("more shared memory than there is")
    for dtype, most in ((torch.bfloat16, 2e-2), (torch.float16, 3e-3)):
        case = sequences(LENGTHS, 2176, heads, kv_heads, head, dtype, layout)
        assert attention.attend(**case, how=how)
        assert (case["out"].double() - reference(case)).abs().max() < most
        first = case["out"].clone()
        for _ in range(3):
            attention.attend(**case, how=how)
            assert torch.equal(case["out"], first)  # in one order, whichever program came last


def test_attention_in_a_graph_follows_the_lengths() -> None:
    """Layers after one another, launched while the ones before them end; the counters are shared."""
    case = sequences([2176] * 24, 2176, 32, 8, 128, torch.bfloat16, "by page")
    case["keys"].nan_to_num_()
    case["values"].nan_to_num_()
    how = attention.plan(24, 8, 128, 2176, 132)
    assert how is not None and how.pieces > 1
    start = case["query"].clone()
    fresh = attention.Plan(how.tile, how.stages, how.piece, how.pieces, 8)

    def chain() -> Any:
        x = start
        for _ in range(12):
            out = torch.empty_like(x)
            attention.attend(**{**case, "query": x, "out": out}, how=how)
            x = out + start
        return x

    chain()
    counters = attention._arrived[start.device]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain()
        assert not attention.attend(**case, how=fresh)  # nothing is compiled in a capture
    (found,) = attention._arrived.values()
    assert found is counters  # the graph has none of its own, which others would read
    for seed in range(10):
        generator = torch.Generator("cuda").manual_seed(seed)
        lengths = torch.randint(0, 2177, (24,), generator=generator, device="cuda", dtype=torch.int32)
        lengths[20:] = 0
        case["lengths"].copy_(lengths)
        start.normal_(generator=generator)
        graph.replay()
        torch.cuda.synchronize()
        replayed = captured.clone()
        assert torch.equal(replayed, chain())
        assert torch.equal(replayed[20:], start[20:])  # no sequence: zeros
        assert not counters.any()
        attention.attend(**{**case, "query": start}, how=how)
        assert (case["out"].double() - reference({**case, "query": start})).abs().max() < 2e-2


def test_the_adapter_in_flash_attention_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """What vLLM's backend calls, with and without the adapter."""
    fa_utils = pytest.importorskip("vllm.v1.attention.backends.fa_utils")
    adapter = pytest.importorskip("rlpatch.adapters.vllm.decode_attention_v0_17")
    if adapter.ADAPTER.relevant() is not None:
        pytest.skip(adapter.ADAPTER.relevant())
    monkeypatch.setattr(adapter, "_suitable", lambda: True)  # no engine: its config is tests/cpu's
    case = sequences([700] * 40, 1024, 32, 8, 128, torch.bfloat16, "by page")
    case["keys"].nan_to_num_()
    case["values"].nan_to_num_()
    call = {
        "q": case["query"].contiguous(), "k": case["keys"], "v": case["values"], "out": case["out"],
        "cu_seqlens_q": torch.arange(41, dtype=torch.int32, device="cuda"), "max_seqlen_q": 1, "seqused_k": case["lengths"],
        "max_seqlen_k": 1024, "softmax_scale": case["scale"], "causal": True, "alibi_slopes": None, "window_size": [-1, -1],
        "block_table": case["table"], "softcap": 0, "scheduler_metadata": None, "fa_version": 3, "q_descale": None,
        "num_splits": 0, "s_aux": None,
    }  # fmt: skip
    theirs = fa_utils.flash_attn_varlen_func(**call).clone()
    case["out"].fill_(float("nan"))

    def none(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("not ours")

    ours = adapter._call(none, None, (), call)
    assert ours is case["out"] and (ours - theirs).abs().max() < 1e-2
