"""Tensors that stay the trainer's own get new places, so that what they keep of others' memory can go."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from rlpatch.sharing.account import rehouse  # noqa: E402

LARGE = 1 << 18  # floats: 1 MiB


def parameter(*shape: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(*shape))


def test_values_stay_and_places_change() -> None:
    ones = [parameter(LARGE), parameter(2, LARGE)]
    values = [one.detach().clone() for one in ones]
    old = [one.untyped_storage() for one in ones]  # held, so that their places are not given out again
    optimizer = torch.optim.SGD(ones, lr=1.0)
    seen = []

    def room(device: torch.device) -> None:
        seen.append((device, [one.untyped_storage().nbytes() for one in ones]))

    assert rehouse([*ones, ones[0]], room) == 3 * LARGE * 4
    assert seen == [(torch.device("cpu"), [0, 0])]  # once, with nothing of them on the device
    assert all(torch.equal(one, value) for one, value in zip(ones, values, strict=True))
    assert not {one.data_ptr() for one in ones} & {storage.data_ptr() for storage in old}
    sum(one.sum() for one in ones).backward()
    optimizer.step()
    assert all(torch.equal(one, value - 1) for one, value in zip(ones, values, strict=True))


def test_what_others_hold_or_is_small_stays() -> None:
    whole = torch.randn(2 * LARGE)
    halves = [torch.nn.Parameter(half) for half in whole.chunk(2)]
    part, small, turned = torch.nn.Parameter(torch.randn(2 * LARGE)[:LARGE]), parameter(8), parameter(LARGE, 2)
    turned.data = turned.data.T
    graded = parameter(LARGE)
    graded.sum().backward()
    stay = [*halves, part, small, turned, graded]
    places = [one.data_ptr() for one in stay]
    assert rehouse(stay, lambda device: pytest.fail("nothing was moved")) == 0
    assert [one.data_ptr() for one in stay] == places
