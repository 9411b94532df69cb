"""Masters against float32 parameters that are fed the same gradients: the same bits, whatever is done to them."""

from __future__ import annotations

import contextlib
import copy
import inspect
import os
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest

torch = pytest.importorskip("torch")
hypothesis = pytest.importorskip("hypothesis")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch import nn  # noqa: E402

from rlpatch.parking import ParkedState  # noqa: E402
from rlpatch.precision import masters as module  # noqa: E402
from rlpatch.precision.masters import Masters, clip_norm, substitute  # noqa: E402

OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "adamw-foreach": lambda groups: torch.optim.AdamW(groups, lr=3e-3, foreach=True),
    "adamw-fused": lambda groups: torch.optim.AdamW(groups, lr=3e-3, fused=True),
    "adamw-loop": lambda groups: torch.optim.AdamW(groups, lr=3e-3, foreach=False, amsgrad=True),
    "sgd-momentum": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9, nesterov=True),
    "adagrad": lambda groups: torch.optim.Adagrad(groups, lr=1e-2, initial_accumulator_value=0.125),  # state at once
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=1e-3, momentum=0.5),
}


class Model(nn.Module):
    """Parameters whose gradients are exactly what is fed; two names for one of them; one frozen, one float32."""

    def __init__(self, shapes: list[tuple[int, ...]], seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weights = nn.ParameterList([torch.randn(shape, generator=generator).bfloat16() for shape in shapes])
        self.tied = self.weights[0]
        self.frozen = nn.Parameter(torch.ones(3, dtype=torch.bfloat16), requires_grad=False)
        self.wide = nn.Parameter(torch.randn(3, generator=generator))

    def trained(self) -> list[nn.Parameter]:
        return [*self.weights, self.wide]

    def groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.weights), "weight_decay": 0.1}, {"params": [self.wide], "weight_decay": 0.0}]


def widened(model: Model) -> Model:
    """The same model with float32 parameters: what plain TRL trains."""
    wide = copy.deepcopy(model)
    for parameter in wide.parameters():
        parameter.data = parameter.data.float()
    return wide


def feed(model: Model, seed: int, scale: float = 1.0) -> None:
    """One backward pass whose gradients are the same bfloat16 values for any dtype of the parameters."""
    generator = torch.Generator().manual_seed(seed)
    gradients = [(scale * torch.randn(p.shape, generator=generator)).bfloat16() for p in model.trained()]
    loss = sum((p * g.to(p.dtype)).sum().float() for p, g in zip(model.trained(), gradients, strict=True))
    loss.backward()


def clipped(model: Model, most: float, first: bool) -> float:
    """Clip by norm as accelerate does under rlpatch; `first`: what clipping sees are float32 gradients already."""
    if first:
        return float(nn.utils.clip_grad_norm_(substitute(model.parameters()), most))
    return float(clip_norm(model.parameters(), most, 2.0, lambda found: nn.utils.clip_grad_norm_(found, most, 2.0)))


def train(
    model: Model, optimizer: Any, steps: range, micro: int, clip: float | None, first: bool = False
) -> list[float]:
    """As the Trainer does it; returns the norms of the gradients."""
    norms = []
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
    for step in steps:
        for batch in range(micro):
            feed(model, 1000 * step + batch)
        norms.append(clipped(model, clip if clip is not None else float("inf"), first))
        optimizer.step()
        schedule.step()
        model.zero_grad()
    return norms


def same(model: Model, masters: Masters, wide: Model) -> None:
    for mine, reference in zip(model.trained(), wide.trained(), strict=True):
        master = masters.master_of(mine, mine)
        assert master.dtype == torch.float32
        assert torch.equal(master, reference)
        assert torch.equal(mine, reference.to(mine.dtype))


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple), min_size=1, max_size=4),
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    steps=st.integers(1, 5),
    micro=st.integers(1, 3),
    clip=st.sampled_from([None, 0.5, 100.0]),
    seed=st.integers(0, 1000),
    piece=st.sampled_from([1, 20, 1 << 28]),
    first=st.booleans(),
)
def test_the_same_bits_as_float32_parameters(
    shapes: list[tuple[int, ...]],
    optimizer: str,
    steps: int,
    micro: int,
    clip: float | None,
    seed: int,
    piece: int,
    first: bool,
) -> None:
    model = Model(shapes, seed)
    wide = widened(model)
    stepped = OPTIMIZERS[optimizer](model.groups())
    masters = Masters()
    assert masters.attach(stepped) == len(shapes)
    with mock.patch.object(module, "PIECE", piece):
        norms = train(model, stepped, range(steps), micro, clip, first)
    assert norms == train(wide, OPTIMIZERS[optimizer](wide.groups()), range(steps), micro, clip)
    same(model, masters, wide)
    assert all(p.grad is None for p in (*model.parameters(), *substitute(model.parameters())))
    assert torch.equal(model.frozen, torch.ones(3))
    masters.dissolve()


def test_small_steps_arrive_in_the_end() -> None:
    """Steps of a thousandth of a bfloat16 spacing: lost without masters, added up with them."""

    def after(steps: int, attach: bool) -> float:
        parameter = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
        optimizer = torch.optim.SGD([parameter], lr=2.0**-18)
        masters = Masters()
        if attach:
            masters.attach(optimizer)
        for _ in range(steps):
            parameter.sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return float(parameter.detach())

    assert after(1 << 11, attach=False) == 1.0
    assert after(1 << 11, attach=True) == 1.0 - 2.0**-7


def test_bytes_per_parameter() -> None:
    model = Model([(32, 32)], 0)
    optimizer = torch.optim.AdamW(list(model.weights), lr=1e-3)
    masters = Masters()
    masters.attach(optimizer)
    count = 32 * 32
    feed(model, 0)
    facts = masters.describe()
    assert (facts["weight_bytes"], facts["master_bytes"], facts["gradient_bytes"]) == (2 * count, 4 * count, 2 * count)
    feed(model, 1)  # a second micro-batch: in float32 from here on
    assert masters.describe()["gradient_bytes"] == 4 * count
    assert all(p.grad is None for p in model.weights)
    optimizer.step()
    facts = masters.describe()
    assert facts["gradient_bytes"] == 0
    assert facts["optimizer_bytes"] == 8 * count + 4  # and the step counter
    masters.dissolve()


class Watched(torch.optim.Optimizer):
    """Says what it is asked to step, and what `seen` is then."""

    __module__ = "torch.optim.watched"  # as if known to treat parameters one by one
    seen: Callable[[], Any]
    steps: list[tuple[list[int], Any]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        stepped = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.steps.append(([p.numel() for p in stepped], self.seen()))
        for parameter in stepped:
            moment = self.state[parameter].setdefault("moment", torch.zeros_like(parameter))
            parameter.sub_(moment.mul_(0.5).add_(parameter.grad), alpha=0.1)


def watched(model: Model, seen: Callable[[], Any] = lambda: None, kind: type[Watched] = Watched) -> Watched:
    optimizer = kind(model.groups(), {})
    optimizer.steps, optimizer.seen = [], seen
    return optimizer


def test_a_step_widens_some_gradients_at_a_time() -> None:
    model = Model([(4,), (9,), (2,), (3,)], 0)
    masters = Masters()
    optimizer = watched(model, lambda: masters.describe()["gradient_bytes"])
    masters.attach(optimizer)
    with mock.patch.object(module, "PIECE", 5):
        feed(model, 0)
        optimizer.step()
        assert optimizer.steps == [([4], 2 * 14 + 16), ([9], 2 * 5 + 36), ([2, 3, 3], 20)]  # the last 3: not a master
        optimizer.steps.clear()
        feed(model, 1)
        feed(model, 2)
        optimizer.step()
        assert optimizer.steps == [([4, 9, 2, 3, 3], 4 * 18)]
        optimizer.steps.clear()
        feed(model, 3)
        optimizer.step(lambda: 0.0)  # may want all gradients, and again
        assert len(optimizer.steps) == 1
    masters.dissolve()


def test_an_optimizer_that_nothing_is_known_of_steps_once() -> None:
    model = Model([(4,), (9,)], 0)
    optimizer = watched(model, kind=type("Other", (Watched,), {"__module__": "somewhere"}))
    masters = Masters()
    masters.attach(optimizer)
    with mock.patch.object(module, "PIECE", 5):
        feed(model, 0)
        optimizer.step()
    assert [sizes for sizes, _ in optimizer.steps] == [[4, 9, 3]]
    masters.dissolve()


def test_the_state_is_back_before_the_first_piece() -> None:
    """Whoever parks it registers later than the masters are attached."""
    model = Model([(4,), (9,), (2,)], 0)
    masters = Masters()
    optimizer = watched(model, lambda: parked.parked_bytes)
    masters.attach(optimizer)
    parked = ParkedState(optimizer, parks=lambda tensor: tensor.numel() > 1, smallest=1)
    with mock.patch.object(module, "PIECE", 1):
        for step in range(3):
            feed(model, step)
            optimizer.step()
            assert parked.parked_bytes == 4 * 18
    assert [seen for _, seen in optimizer.steps] == [0] * 9
    parked.close()
    masters.dissolve()


@pytest.fixture
def both() -> Any:
    """(model, optimizer) with masters behind them, and the same in float32: compared at the end."""
    model = Model([(4,), (9,)], 0)
    pairs = [(m, torch.optim.SGD(m.groups(), lr=0.1)) for m in (model, widened(model))]
    masters = Masters()
    masters.attach(pairs[0][1])
    yield pairs
    same(model, masters, pairs[1][0])
    masters.dissolve()
    assert "zero_grad" not in vars(pairs[0][1])


def test_the_optimizer_s_zero_grad_clears_what_waits(both: Any) -> None:
    for m, o in both:
        feed(m, 0)
        clipped(m, 0.5, False)
        assert "set_to_none" in inspect.signature(o.zero_grad).parameters  # accelerate looks
        o.zero_grad(set_to_none=True)
        assert all(p.grad is None for p in m.parameters())
        feed(m, 1)
        o.step()


def test_a_step_that_never_comes_does_not_scale_the_next(both: Any) -> None:
    for m, o in both:
        feed(m, 0)
        clipped(m, 0.5, False)
        m.zero_grad()  # skipped: the norm was not finite, say
        feed(m, 1)
        o.step()
        m.zero_grad()
        feed(m, 2)
        clipped(m, 0.5, False)
        feed(m, 3)  # clipped in between
        clipped(m, 0.75, False)
        o.step()


@pytest.mark.parametrize("direction", ["to masters", "from masters", "masters to masters"])
@pytest.mark.parametrize("through", ["cpu", "file"])
def test_checkpoints_continue_bit_by_bit(direction: str, through: str, tmp_path: Any) -> None:
    """Model and optimizer state written by the one and read by the other, in the Trainer's order: model first."""
    model = Model([(4, 5), (3,)], 7)
    wide = widened(model)
    straight = widened(model)
    train(straight, OPTIMIZERS["adamw-foreach"](straight.groups()), range(6), 2, 1.0)

    def saved(model: Model, masters: Masters | None) -> dict[str, Any]:
        optimizer = OPTIMIZERS["adamw-foreach"](model.groups())
        if masters is not None:
            masters.watch(model)
            masters.attach(optimizer)
        train(model, optimizer, range(3), 2, 1.0)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        assert all(tensor.dtype == torch.float32 for name, tensor in state["model"].items() if name != "frozen")
        if through == "file":
            torch.save(state, tmp_path / "state.pt")
            state = torch.load(tmp_path / "state.pt", weights_only=True)
        return copy.deepcopy(state)

    state = saved(wide, None) if direction == "to masters" else saved(model, Masters())
    fresh = Model([(4, 5), (3,)], 99)
    masters = None if direction == "from masters" else Masters()
    if masters is None:
        fresh = widened(fresh)
    else:
        masters.watch(fresh)
    fresh.load_state_dict(state["model"])
    optimizer = OPTIMIZERS["adamw-foreach"](fresh.groups())
    if masters is not None:
        masters.attach(optimizer)
    optimizer.load_state_dict(state["optimizer"])
    schedule_free_steps(fresh, optimizer, range(3, 6))
    if masters is not None:
        same(fresh, masters, straight)
    else:
        assert all(torch.equal(a, b) for a, b in zip(fresh.trained(), straight.trained(), strict=True))


def schedule_free_steps(model: Model, optimizer: Any, steps: range) -> None:
    """`train` again from the middle: its schedule goes on where the state's learning rate stands."""
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 / (1 + step)
        for batch in range(2):
            feed(model, 1000 * step + batch)
        nn.utils.clip_grad_norm_(substitute(model.parameters()), 1.0)
        optimizer.step()
        model.zero_grad()


def test_late_gradients_stay_until_the_step() -> None:
    """For DistributedDataParallel, which reduces the parameters' own gradients."""
    model = Model([(4, 4)], 0)
    optimizer = torch.optim.SGD(list(model.weights), lr=0.5)
    masters = Masters(late=True)
    masters.attach(optimizer)
    feed(model, 0)
    assert model.weights[0].grad is not None
    before, gradient = model.weights[0].detach().float(), model.weights[0].grad.float()
    optimizer.step()
    assert torch.equal(masters.master_of(model.weights[0]), before - 0.5 * gradient)
    assert model.weights[0].grad is None
    masters.dissolve()


class Fed(nn.Module):
    """A module whose gradients are its input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(6.0).bfloat16())

    def forward(self, gradient: Any) -> Any:
        return (self.weight * gradient.to(self.weight.dtype)).sum()


def _rank(rank: int, folder: str) -> None:
    import torch.distributed as distributed

    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    mine, wide = Fed(), Fed()
    wide.weight.data = wide.weight.data.float()
    pairs = []
    for one in (mine, wide):
        optimizer = torch.optim.AdamW(one.parameters(), lr=1e-3)
        pairs.append((nn.parallel.DistributedDataParallel(one), optimizer))
    masters = Masters(late=True)
    masters.attach(pairs[0][1])
    for step in range(4):
        for parallel, optimizer in pairs:
            for batch in range(2):  # whole numbers: their mean over ranks is exact in bfloat16
                gradient = torch.arange(6.0) * (1 + rank) + 2 * step + 4 * batch
                with parallel.no_sync() if batch == 0 else contextlib.nullcontext():
                    parallel(gradient).backward()
            nn.utils.clip_grad_norm_(substitute(parallel.parameters()), 1.0)
            optimizer.step()
            parallel.zero_grad()
    assert torch.equal(masters.master_of(mine.weight), wide.weight)
    assert not torch.equal(wide.weight, Fed().weight.float())
    distributed.barrier()  # neither leaves while the other still reduces
    distributed.destroy_process_group()
    os._exit(0)  # gloo's threads have aborted a process in the interpreter's shutdown


def test_data_parallel_training(tmp_path: Any) -> None:
    """Two processes: gradients are reduced before they become the masters'."""
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)


def test_loaded_half_precision_replaces_masters() -> None:
    model = Model([(4,)], 0)
    masters = Masters()
    masters.watch(model)
    masters.attach(torch.optim.SGD(list(model.weights), lr=0.1))
    other = Model([(4,)], 1)
    model.load_state_dict(other.state_dict())
    assert torch.equal(masters.master_of(model.weights[0]), other.weights[0].float())
    masters.dissolve()


def test_a_second_optimizer_takes_over_the_masters() -> None:
    model = Model([(4,)], 0)
    masters = Masters()
    first = torch.optim.SGD(list(model.weights), lr=1e-4)
    masters.attach(first)
    feed(model, 0)
    first.step()
    exact = masters.master_of(model.weights[0]).detach().clone()
    second = torch.optim.SGD(list(model.weights), lr=1e-4)
    masters.attach(second)
    assert torch.equal(masters.master_of(model.weights[0]), exact)
    assert not torch.equal(exact, model.weights[0].float())
    feed(model, 1)
    second.step()
    assert not torch.equal(masters.master_of(model.weights[0]), exact)
    masters.dissolve()


def test_dissolved_training_goes_on_in_float32() -> None:
    model = Model([(4, 3), (5,)], 3)
    wide = widened(model)
    optimizer, reference = (OPTIMIZERS["adamw-foreach"](m.groups()) for m in (model, wide))
    masters = Masters()
    masters.watch(model)
    masters.attach(optimizer)
    for m, o in ((model, optimizer), (wide, reference)):
        schedule_free_steps(m, o, range(3))
        feed(m, 5)  # in the middle of a step
    masters.dissolve()
    assert all(p.dtype == torch.float32 for p in model.trained())
    for m, o in ((model, optimizer), (wide, reference)):
        o.step()
        m.zero_grad()
        schedule_free_steps(m, o, range(3, 5))
    assert all(torch.equal(a, b) for a, b in zip(model.trained(), wide.trained(), strict=True))
    assert not any(m._state_dict_hooks or m._load_state_dict_pre_hooks for m in model.modules())


def test_a_copied_model_is_a_model_of_its_own() -> None:
    model = Model([(4,)], 0)
    masters = Masters()
    masters.watch(model)
    masters.attach(torch.optim.SGD(list(model.weights), lr=0.1))
    twin = copy.deepcopy(model)
    assert twin.state_dict()["weights.0"].dtype == torch.bfloat16
    feed(twin, 0)
    assert twin.weights[0].grad is not None and masters.master_of(model.weights[0]).grad is None
    masters.dissolve()


def test_what_is_no_optimizer_is_refused() -> None:
    with pytest.raises(TypeError, match=r"is not a torch\.optim\.Optimizer"):
        Masters().attach(object())  # type: ignore[arg-type]
