"""Linear layers of few rows on a real GPU: every tile against float64, eagerly, in a CUDA graph, and the choice itself."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs CUDA", allow_module_level=True)
pytest.importorskip("triton")

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
    library, ours = choices.seconds[keys[0]]
    assert 1e-6 < library < 1e-3 and ours is not None and 1e-6 < ours < 1e-3
    assert choices.tune(weights, 8) == keys
    x, weight, bias = made(40, 4096, 4096, torch.bfloat16)
    assert torch.equal(torch.ops.rlpatch.skinny_linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))
    assert error(torch.ops.rlpatch.skinny_linear(x[:8], weight, bias), x[:8], weight, bias) < 0.05
    assert torch.ops.rlpatch.skinny_linear(x[:0], weight, None).shape == (0, 4096)
    assert torch.ops.rlpatch.skinny_linear(x[:, ::2], weight[:, ::2], None).shape == (40, 4096)  # not contiguous


def test_what_no_tile_covers_is_left() -> None:
    weights = [made(1, 1000, 250, torch.bfloat16)[1]]
    keys = skinny.CHOICES.tune(weights, 64)
    assert len(keys) == 3 and all(skinny.CHOICES.tiles[key] is None for key in keys)
