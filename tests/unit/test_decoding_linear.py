"""Linear layers of few rows: which kernel is chosen, what the operator leaves alone, and the kernel itself.

Times are given, there is no GPU; the kernel runs in Triton's interpreter, where Triton is installed. On a GPU:
tests/gpu/test_decoding_gpu.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from triton_interpreter import agrees

torch = pytest.importorskip("torch")

from rlpatch.decoding import linear as skinny  # noqa: E402
from rlpatch.decoding.linear import LT, TILES, Choices, Tile, shape_of, size_for, usable  # noqa: E402


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> dict[Any, float]:
    """``{tile or None: seconds}``, to be filled; a tile that is missing cannot be launched. `LT`: cuBLASLt, else 10."""
    given: dict[Any, float] = {}
    asked: list[Tile | str] = []

    def launch(x: Any, weight: Any, bias: Any, size: int, tile: Tile) -> None:
        asked.append(tile)

    def addmm(bias: Any, x: Any, weight: Any) -> Any:
        assert not bias.any()
        asked.append(LT)
        return x @ weight

    def timed(run: Callable[[Any], Any], weights: Any) -> float:
        asked.clear()
        run(weights[0])
        return given.get(LT, 10) if asked == [LT] else given[asked[0] if asked else None]

    monkeypatch.setattr(skinny, "launch", launch)
    monkeypatch.setattr(skinny, "timed", timed)
    monkeypatch.setattr(torch, "addmm", addmm)
    return given


def weight(columns: int = 256, depth: int = 512) -> Any:
    return torch.zeros(columns, depth, dtype=torch.bfloat16)


def test_the_fastest_is_chosen_and_a_tie_goes_to_the_library(
    times: dict[Any, float], caplog: pytest.LogCaptureFixture
) -> None:
    first, second, third = TILES[16]
    key = (shape_of(weight()), 16)
    for seconds, expected in (
        ({None: 10, first: 8, second: 7, third: 9}, second),
        ({None: 10, first: 8, second: 7.9, third: 9}, first),  # a hair's breadth is none
        ({None: 10, first: 9.9, second: 11, third: 12}, None),
        ({None: 10, first: 11, second: 12, third: 13}, None),
        ({None: 10, second: 9}, second),  # the others ask for more than this GPU has
        ({None: 10}, None),
        ({None: 10, first: 8, second: 9, third: 9, LT: 7}, LT),
        ({None: 10, first: 8, second: 9, third: 9, LT: 8.1}, LT),
        ({None: 10, first: 8, second: 9, third: 9, LT: 8.5}, first),
        ({None: 10, LT: 9}, LT),
    ):
        times.clear()
        times.update(seconds)
        made = Choices()
        caplog.clear()
        assert made.tune([weight(), weight()], 8) == [key]
        assert ("no kernel for few rows can be launched" in caplog.text) is (
            not {first, second, third} & seconds.keys()
        )
        assert made.taken[key] == expected
        tiles = [time for tile, time in seconds.items() if isinstance(tile, Tile)]
        library, lt, fastest = made.seconds[key]
        assert library == 10 and lt == seconds.get(LT, 10)
        assert fastest == (8 if expected is first else min(tiles, default=None))
        (entry,) = made.describe([key])
        assert entry["weight"] == "256 x 512 bfloat16" and entry["rows"] == 16 and entry["cublas_us"] == 10e6
        name = f"{expected.columns} x {expected.step}" if isinstance(expected, Tile) else expected or "cublas"
        assert entry["taken"] == name


def test_a_shape_is_timed_once_and_for_the_sizes_that_are_reached(times: dict[Any, float]) -> None:
    times.update({None: 2.0, **{tile: 1.0 for tiles in TILES.values() for tile in tiles}})
    made = Choices()
    weights = [weight(), weight(512), weight()]
    assert [size for _, size in made.tune(weights, 8)] == [16, 16]
    times.clear()  # nothing can be timed any more
    assert [size for _, size in made.tune(weights, 16)] == [16, 16]
    times.update({None: 2.0, **{tile: 1.0 for tiles in TILES.values() for tile in tiles}})
    assert [size for _, size in made.tune([weight()], 17)] == [16, 32]
    assert [size for _, size in made.tune([weight()], 1000)] == [16, 32, 64]
    assert made.tune([], 8) == []


def test_a_tile_covers_a_weight_or_is_not_tried(times: dict[Any, float]) -> None:
    times.update({None: 2.0, **{tile: 1.0 for tiles in TILES.values() for tile in tiles}})
    made = Choices()
    for shape in ((250, 512), (256, 500)):
        (key,) = made.tune([weight(*shape)], 8)
        assert made.taken[key] is None and made.seconds[key] == (2.0, 10, None)
    (key,) = made.tune([weight(32, 128)], 8)
    assert made.taken[key] == TILES[16][0]


def test_sizes_and_what_is_usable() -> None:
    assert [size_for(rows) for rows in (1, 16, 17, 64, 65)] == [16, 16, 32, 64, None]
    assert usable(weight()) and usable(weight().half()) and usable(torch.nn.Parameter(weight(), requires_grad=False))
    for other in (weight().float(), weight().t(), weight()[0], weight()[:, ::2], None):
        assert not usable(other)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, int]]:
    seen: list[tuple[Any, int]] = []

    def launch(x: Any, weight: Any, bias: Any, size: int, tile: Tile) -> Any:
        seen.append((tuple(x.shape), size))
        return torch.nn.functional.linear(x, weight, bias)

    monkeypatch.setattr(skinny, "launch", launch)
    monkeypatch.setattr(skinny, "CHOICES", Choices())
    skinny.register()
    return seen


def test_the_operator_launches_what_was_chosen_and_leaves_the_rest(launched: list[Any]) -> None:
    w, bias = torch.randn(96, 64).bfloat16(), torch.randn(96).bfloat16()
    op = torch.ops.rlpatch.skinny_linear
    skinny.CHOICES.taken = {(shape_of(w), 16): Tile(32, 64, 2), (shape_of(w), 32): None, (shape_of(w), 64): LT}
    skinny.CHOICES.zeros = {shape_of(w): torch.zeros(96).bfloat16()}
    for shape, expected in (
        ((8, 64), [((8, 64), 16)]),
        ((2, 4, 64), [((8, 64), 16)]),
        ((64,), [((1, 64), 16)]),
        ((20, 64), []),  # the library was faster
        ((40, 64), []),  # cuBLASLt was
        ((65, 64), []),
        ((0, 64), []),
    ):
        launched.clear()
        x = torch.randn(shape).bfloat16()
        for given in (None, bias):
            assert torch.equal(op(x, w, given), torch.nn.functional.linear(x, w, given))
        assert launched == expected * 2
    skinny.CHOICES.zeros = {shape_of(w): bias}  # to be told from none
    x = torch.randn(40, 64).bfloat16()
    assert torch.equal(op(x, w, None), torch.nn.functional.linear(x, w, bias))
    launched.clear()
    wide = torch.randn(8, 128).bfloat16()
    assert op(wide[:, ::2], w, None).shape == (8, 96) and not launched  # its rows have gaps
    with pytest.raises(RuntimeError):
        op(wide[:, :64].float(), w, None)  # as torch.nn.functional.linear
    assert not launched


def test_the_operator_is_opaque_to_torch_compile(launched: list[Any]) -> None:
    w = torch.randn(96, 64).bfloat16()
    skinny.CHOICES.taken = {(shape_of(w), 16): Tile(32, 64, 2)}
    compiled = torch.compile(
        lambda x: torch.ops.rlpatch.skinny_linear(x + 1, w, None) * 2, backend="eager", fullgraph=True, dynamic=True
    )
    for rows in (8, 100):
        x = torch.randn(rows, 64).bfloat16()
        assert torch.equal(compiled(x), torch.nn.functional.linear(x + 1, w) * 2)
    assert launched == [((8, 64), 16)]
    with torch.device("meta"):
        assert torch.ops.rlpatch.skinny_linear(torch.empty(2, 3, 64), torch.empty(96, 64), None).shape == (2, 3, 96)


CASE = """
    import torch
    from rlpatch.decoding.linear import TILES, launch

    torch.manual_seed(0)
    for size, tiles in TILES.items():
        for tile in tiles:
            for rows in (1, size - 3, size):
                x = torch.randn(rows, 512, dtype=torch.float16)
                weight = torch.randn(256, 512, dtype=torch.float16) / 10
                bias = torch.randn(256, dtype=torch.float16)
                for given in (None, bias):
                    exact = x.double() @ weight.double().T + (0 if given is None else given.double())
                    found = launch(x, weight, given, size, tile)
                    assert found.shape == (rows, 256) and found.dtype is torch.float16
                    assert (found - exact).abs().max() < 6e-3, (size, tile, rows)  # a rounding of fp16
    print("agreed")
"""


def test_every_tile_in_the_interpreter(tmp_path: Path) -> None:
    """In fp16: the interpreter's products of bf16 are not to be trusted."""
    pytest.importorskip("triton")
    agrees(CASE, tmp_path)
