"""Where tensors lie: what is resident twice, and new places for what stays the trainer's own."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from rlpatch.sharing.account import rehouse, resident_twice  # noqa: E402

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


def policy(rank: int, *weights: torch.Tensor) -> torch.nn.Module:
    """A module with these weights and, beside the first, adapters of `rank` rows."""
    model = torch.nn.Module()
    for index, weight in enumerate(weights):
        layer = torch.nn.Module()
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        model.add_module(f"layer{index}", layer)
    if rank:
        model.layer0.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(64, rank, bias=False)})
    return model


@pytest.mark.parametrize("rank", [0, 4])
def test_rows_that_fill_up_a_vocabulary_are_no_second_copy(rank: int) -> None:
    padded = torch.zeros(64, 64)
    mine = torch.from_numpy(padded.numpy()[:61])  # its storage ends where the trainer's rows do
    assert resident_twice(policy(rank, mine), policy(0, padded)) == 0
    assert resident_twice(policy(rank, mine, torch.zeros(8, 8)), policy(0, padded, torch.zeros(8, 8))) == 4 * 64
