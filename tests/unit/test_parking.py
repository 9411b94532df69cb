"""Optimizer state that waits in host memory between steps. Here the device is the CPU as well: what is told apart is whose
memory a tensor lies in."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch.utils._pytree import tree_map  # noqa: E402

from rlpatch.parking import ParkedState, on_accelerator  # noqa: E402

Make = Callable[[Any], Any]
OPTIMIZERS: dict[str, Make] = {
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.1),
    "adamw, fused": lambda ps: torch.optim.AdamW(ps, lr=0.1, fused=True),
    "adamw, foreach, amsgrad": lambda ps: torch.optim.AdamW(ps, lr=0.1, foreach=True, amsgrad=True),
    "momentum": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, lr=0.1),  # has state before the first step
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1),
}


def parked(optimizer: Any, smallest: int = 64) -> ParkedState:
    return ParkedState(optimizer, parks=lambda tensor: True, smallest=smallest)


def model() -> Any:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.LayerNorm(32), torch.nn.Linear(32, 4))


def step(net: Any, optimizer: Any, seed: int) -> None:
    torch.manual_seed(seed)
    optimizer.zero_grad()
    net(torch.randn(8, 16)).square().mean().backward()
    optimizer.step()


def tensors(optimizer: Any) -> list[Any]:
    return [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]


def lies_in(state: ParkedState, tensor: Any) -> bool:
    begin = state._arena.data_ptr()
    return begin <= tensor.data_ptr() < begin + state._arena.nbytes


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_the_same_training(name: str) -> None:
    one, other = model(), model()
    plain, optimizer = OPTIMIZERS[name](one.parameters()), OPTIMIZERS[name](other.parameters())
    state = parked(optimizer)
    seen: list[bool] = []
    optimizer.register_step_pre_hook(lambda *_: seen.extend(lies_in(state, t) for t in tensors(optimizer)))
    for seed in range(4):
        step(one, plain, seed)
        step(other, optimizer, seed)
        large = [t for t in tensors(optimizer) if t.nbytes >= 64]
        assert all(lies_in(state, t) for t in large)
        assert not any(lies_in(state, t) for t in tensors(optimizer) if t.nbytes < 64)
        assert state.parked_bytes == sum(t.nbytes for t in large)
    assert not any(seen)  # each step finds it at home
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
    for mine, theirs in zip(tensors(optimizer), tensors(plain), strict=True):
        assert torch.equal(mine, theirs) and mine.stride() == theirs.stride()


def test_transposed_state_and_views_of_others() -> None:
    weight = torch.nn.Parameter(torch.randn(32, 16).t())
    optimizer = torch.optim.SGD([weight], lr=0.1)
    state = parked(optimizer)
    shared = torch.randn(64)
    values = {"transposed": torch.randn(16, 8).t(), "view": shared[:32], "gaps": torch.randn(8, 8)[:, :4], "n": 3}
    expected = {name: v.clone() if isinstance(v, torch.Tensor) else v for name, v in values.items()}
    optimizer.state[weight].update(values)
    state.park()
    assert lies_in(state, values["transposed"]) and values["transposed"].stride() == (1, 8)
    assert not lies_in(state, values["view"]) and not lies_in(state, values["gaps"])
    state.park()  # already
    state.fetch()
    for name, value in values.items():
        assert value == 3 if name == "n" else torch.equal(value, expected[name])
    assert not lies_in(state, values["transposed"]) and state.parked_bytes == 0


@pytest.mark.parametrize("hooked", [True, False], ids=["hooks", "no hooks, as bitsandbytes"])
def test_a_checkpoint_between_steps(hooked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    nets = [model(), model()]
    plain, optimizer = (torch.optim.AdamW(net.parameters(), lr=0.1) for net in nets)
    parked(optimizer)
    for seed in range(3):
        step(nets[0], plain, seed)
        step(nets[1], optimizer, seed)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)  # parked
    file.seek(0)
    # a load onto a GPU gives each tensor memory of its own
    loaded = tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, torch.load(file))

    net = model()
    net.load_state_dict(nets[1].state_dict())
    resumed = torch.optim.AdamW(net.parameters(), lr=0.1)
    state = parked(resumed)
    step(net, resumed, 9)  # so that there is state that goes
    net.load_state_dict(nets[1].state_dict())
    if not hooked:
        monkeypatch.setattr(resumed, "_optimizer_load_state_dict_post_hooks", {})
    resumed.load_state_dict(loaded)
    assert all(lies_in(state, t) == hooked for t in tensors(resumed) if t.nbytes >= 64)
    brought, empty_like = [], torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: (brought.append(a[0]), empty_like(*a, **k))[1])
    state.fetch()
    assert len(brought) == (sum(t.nbytes >= 64 for t in tensors(resumed)) if hooked else 0)  # nothing that nobody needs
    monkeypatch.undo()
    step(nets[0], plain, 7)
    step(net, resumed, 7)
    assert all(torch.equal(p, q) for p, q in zip(nets[0].parameters(), net.parameters(), strict=True))
    assert state.parked_bytes > 0


def test_an_optimizer_that_is_let_go_takes_it_all_along() -> None:
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    state = parked(optimizer)
    step(net, optimizer, 0)
    state.close()
    assert not any(lies_in(state, t) for t in tensors(optimizer)) and state.parked_bytes == 0
    step(net, optimizer, 1)
    assert state.parked_bytes == 0


def test_a_failure_half_way_back_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    state = parked(optimizer)
    step(net, optimizer, 0)
    expected = [t.clone() for t in tensors(optimizer)]
    made, empty_like = [0], torch.empty_like

    def scarce(*args: Any, **kwargs: Any) -> Any:
        made[0] += 1
        if made[0] > 2:
            raise torch.OutOfMemoryError("no room")
        return empty_like(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_like", scarce)
        with pytest.raises(torch.OutOfMemoryError):
            state.fetch()
    assert sum(not lies_in(state, t) for t in tensors(optimizer) if t.nbytes >= 64) == 2
    state.fetch()
    assert all(torch.equal(t, e) for t, e in zip(tensors(optimizer), expected, strict=True))
    assert not any(lies_in(state, t) for t in tensors(optimizer))


def test_the_host_has_what_is_on_the_host() -> None:
    assert not on_accelerator(torch.ones(4))
    assert not on_accelerator(torch.ones(4, device="meta"))
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    state = ParkedState(optimizer, smallest=1)
    step(net, optimizer, 0)
    assert state.parked_bytes == 0 and not state._away
