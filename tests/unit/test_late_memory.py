"""Parameters that give their memory back until something touches them."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from rlpatch.sharing.late import Crowded, LateMemory, free_bytes  # noqa: E402

SIZE = 1 << 20  # elements; 4 MiB


class Registered(nn.Module):
    """The ways in which engines make parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.untouched = nn.Parameter(torch.empty(1024, 1024), requires_grad=False)
        self.register_parameter("again", nn.Parameter(torch.empty(SIZE), requires_grad=False))
        self.tied = self.untouched
        self.ones = nn.Parameter(torch.ones(SIZE))
        filled = torch.empty(SIZE)
        filled.fill_(3)
        self.filled = nn.Parameter(filled)
        self.linear = nn.Linear(1024, 1024, bias=False)  # initialises after registration
        self.small = nn.Parameter(torch.empty(16))


def sizes(module: nn.Module) -> dict[str, int]:
    return {name: p.untyped_storage().nbytes() for name, p in module.named_parameters()}


def test_only_what_nobody_wrote_to_is_given_back() -> None:
    with LateMemory() as late:
        module = Registered()
        found = sizes(module)
        assert found["untouched"] == found["again"] == 0
        assert module.untouched.to("meta").shape == torch.empty_like(module.untouched).shape
        assert sizes(module)["untouched"] == 0
        assert found["ones"] == found["filled"] == found["linear.weight"] == 4 * SIZE and found["small"] == 64
    assert late.deferred_bytes == 3 * 4 * SIZE  # the linear layer's too, until it was initialised
    assert set(sizes(module).values()) == {4 * SIZE, 64}
    assert float(module.ones.sum()) == SIZE and float(module.filled.sum()) == 3 * SIZE
    assert 0 < float(module.linear.weight.detach().abs().max()) < 1


@pytest.mark.parametrize(
    "touch",
    [
        lambda p: p.data.copy_(torch.full_like(p, 7.0)),
        lambda p: p.data.narrow(0, 0, 1024).copy_(torch.full((1024, *p.shape[1:]), 7.0)),
        lambda p: p.data[:].fill_(7.0),
        lambda p: torch.full(p.shape, 7.0, out=p.data),
    ],
)
def test_touching_brings_the_memory_back(touch: Any) -> None:
    with LateMemory() as late:
        module = Registered()
        touch(module.untouched)
        assert sizes(module)["untouched"] == 4 * SIZE and sizes(module)["again"] == 0
        assert bool((module.untouched == 7).all())
        late.finish()
        assert sizes(module)["again"] == 4 * SIZE
        other = Registered()
        assert sizes(other)["untouched"] == 4 * SIZE  # over
    assert bool((module.tied == 7).all())


def test_other_modules_are_left_alone_afterwards() -> None:
    with LateMemory():
        pass
    assert sizes(Registered())["untouched"] == 4 * SIZE


def test_an_error_goes_through() -> None:
    with pytest.raises(ValueError, match="mine"), LateMemory():
        Registered()
        raise ValueError("mine")
    assert sizes(Registered())["untouched"] == 4 * SIZE


def test_a_recycled_address_is_not_taken_for_fresh() -> None:
    with LateMemory() as late:
        for _ in range(50):
            torch.empty(SIZE)
            made = nn.Module()
            made.weight = nn.Parameter(torch.full((SIZE,), 5.0))
            assert float(made.weight.sum()) == 5 * SIZE
    assert late.deferred_bytes == 0


def test_free_bytes_and_the_cpu_has_no_cache_to_empty() -> None:
    assert free_bytes(torch.device("cpu")) > 1 << 20
    crowded = Crowded(torch.device("cpu"))
    crowded.freed(4 << 30)


def test_what_is_freed_goes_back_outside_of_the_engine_s_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's calls, recorded: no such device is here."""
    calls: list[str] = []

    @contextlib.contextmanager
    def outside() -> Iterator[None]:
        calls.append("out")
        yield
        calls.append("in")

    device = types.SimpleNamespace(empty_cache=lambda: calls.append("empty"))
    monkeypatch.setattr(torch, "get_device_module", lambda which: device)
    crowded = Crowded(torch.device("cuda"), outside)
    crowded.freed(1)  # what was cached before
    assert calls == ["out", "empty", "in"]
    crowded.freed(Crowded.step - 1)
    assert len(calls) == 3
    crowded.freed(1)
    assert calls == ["out", "empty", "in"] * 2
