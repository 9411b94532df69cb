"""4-bit weights on one copy: where the bytes lie, whose state is read, what is refused; without vLLM.

The engine is a stand-in with vLLM's layout (fused ``uint8 [n, 1]`` parameters, loaders that copy into narrowed views);
the trainer's weights are stand-ins for ``Params4bit``, and real ones where bitsandbytes is installed.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from rlpatch import phases, registry  # noqa: E402
from rlpatch.adapters.vllm import _bitsandbytes, bitsandbytes_v0_9, bitsandbytes_v0_28  # noqa: E402
from rlpatch.errors import SharingError  # noqa: E402
from rlpatch.sharing import quantized  # noqa: E402
from rlpatch.sharing.quantized import QuantizedSharing, data_twice, refusal, states_twice  # noqa: E402
from rlpatch.sharing.share import trainer_slots  # noqa: E402
from rlpatch.sharing.trace import storage_key  # noqa: E402

K, BLOCK = 64, 64
ROWS = {"v": 4, "q": 8, "k": 4, "o": 6}  # not in the order in which the engine fuses them
FUSED = {"q": ("qkv", 0), "k": ("qkv", 1), "v": ("qkv", 2), "o": ("o", 0)}


@dataclass
class State:
    """bitsandbytes' ``QuantState`` as far as it is used here."""

    absmax: Any
    shape: tuple[int, int]
    code: Any
    dtype: Any = torch.bfloat16
    blocksize: int = BLOCK
    quant_type: str = "nf4"
    offset: Any = None
    state2: Any = None
    nested: bool = False


def state(rows: int, nested: bool, seed: int = 0) -> State:
    torch.manual_seed(seed)
    blocks = rows * K // BLOCK
    if not nested:
        return State(torch.rand(blocks), (rows, K), torch.linspace(-1, 1, 16))
    second = State(torch.rand(1) + 1, (), torch.linspace(-1, 1, 256), torch.float32, 256)
    return State(
        torch.randint(0, 256, (blocks,), dtype=torch.uint8), (rows, K), torch.linspace(-1, 1, 16), offset=torch.rand(()),
        state2=second, nested=True,
    )  # fmt: skip


def flat(state: State) -> Any:
    return state.state2.code[state.absmax.long()] * state.state2.absmax + state.offset


class Layer(nn.Module):
    def __init__(self, rows: int, nested: bool, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        data = torch.randint(1, 256, (rows * K // 2, 1), dtype=torch.uint8)
        self.weight = nn.Parameter(data, requires_grad=False)
        self.weight.quant_state = state(rows, nested, seed)
        self.weight.quant_storage = torch.uint8


class Trainer(nn.Module):
    def __init__(self, nested: bool = True) -> None:
        super().__init__()
        for seed, (name, rows) in enumerate(ROWS.items()):
            self.add_module(name, Layer(rows, nested, seed))
        self.norm = nn.LayerNorm(K, bias=False)


class Engine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for fused in ("qkv", "o"):
            rows = sum(ROWS[name] for name, (owner, _) in FUSED.items() if owner == fused)
            layer = nn.Module()
            layer.weight = nn.Parameter(torch.zeros(rows * K // 2, 1, dtype=torch.uint8), requires_grad=False)
            layer.weight.pack_factor = 2
            self.add_module(fused, layer)
        self.norm = nn.LayerNorm(K, bias=False)

    def load_weights(self, weights: Any) -> set[str]:
        loaded = set()
        for name, tensor in weights:
            owner = name.removesuffix(".weight")
            if owner not in FUSED:
                target = self.norm.weight.data
            else:
                fused, position = FUSED[owner]
                before = [n for n, (f, p) in FUSED.items() if f == fused and p < position]
                start = sum(ROWS[n] for n in before) * K // 2
                target = self.get_parameter(f"{fused}.weight").data.narrow(0, start, ROWS[owner] * K // 2)
            assert target.shape == tensor.shape
            target.copy_(tensor)
            loaded.add(name)
        return loaded


def join(trainer: Any, engine: Any | None = None, flat_absmax: Any = flat) -> tuple[Any, QuantizedSharing]:
    engine = engine or Engine()
    sharing = QuantizedSharing(trainer_slots(trainer), None, flat_absmax)
    sharing.fill(engine, engine.load_weights)
    sharing.bind()
    sharing.verify()
    return engine, sharing


@pytest.mark.parametrize("nested", [False, True])
def test_one_copy_of_bytes_and_states(nested: bool) -> None:
    trainer, engine = Trainer(nested), Engine()
    data = {name: getattr(trainer, name).weight.data.clone() for name in ROWS}
    absmax = {
        name: flat(s) if nested else s.absmax.clone()
        for name in ROWS
        for s in [getattr(trainer, name).weight.quant_state]
    }
    pointers = {name: p.data_ptr() for name, p in engine.named_parameters()}
    engine, sharing = join(trainer, engine)

    assert {name: p.data_ptr() for name, p in engine.named_parameters()} == pointers
    assert data_twice(trainer, engine) == 0 and states_twice(trainer, engine) == 0
    for name, (fused, position) in FUSED.items():
        weight, parameter = getattr(trainer, name).weight, engine.get_parameter(f"{fused}.weight")
        start, end = parameter.bnb_shard_offsets[position : position + 2]
        assert torch.equal(weight.data, data[name]) and torch.equal(parameter.data[start:end], data[name])
        assert weight.data_ptr() == parameter.data_ptr() + int(start)
        theirs = parameter.bnb_quant_state[position]
        assert theirs is not weight.quant_state and theirs.shape == (ROWS[name], K)
        assert theirs.absmax is weight.quant_state.absmax and torch.equal(theirs.absmax, absmax[name])
        assert not theirs.nested and not weight.quant_state.nested and theirs.state2 is None
    assert engine.get_parameter("qkv.weight").bnb_shard_offsets.tolist() == [0, 256, 384, 512]
    weights = sum(ROWS.values()) * K
    assert sharing.quantization() == {
        "weights": 4, "data_bytes": weights // 2, "absmax_bytes": weights // BLOCK * 4,
        "host_bytes": (weights // BLOCK + 4 * (4 + 4)) if nested else 0,
    }  # fmt: skip
    assert not sharing.copied and sharing.sync() == 0


@pytest.mark.parametrize("nested", [False, True])
def test_parting_gives_the_trainer_its_own_state_back(nested: bool) -> None:
    trainer = Trainer(nested)
    before = {name: copy.deepcopy(getattr(trainer, name).weight.quant_state) for name in ROWS}
    engine, sharing = join(trainer)
    served = {n: p.bnb_quant_state[0].absmax.clone() for n, p in engine.named_parameters() if quantized.is_packed(p)}
    sharing.part()
    for name, old in before.items():
        new = getattr(trainer, name).weight.quant_state
        assert new.nested == nested and torch.equal(new.absmax, old.absmax) and new.absmax.dtype == old.absmax.dtype
        if nested:
            assert torch.equal(new.offset, old.offset) and torch.equal(new.state2.absmax, old.state2.absmax)
    total = sum(getattr(trainer, name).weight.numel() for name in ROWS)
    assert data_twice(trainer, engine) == total  # memory of its own again
    for name, absmax in served.items():  # and the engine goes on with what it had
        assert torch.equal(engine.get_parameter(name).bnb_quant_state[0].absmax, absmax)


def test_bitsandbytes_repacks_nothing_while_it_is_shared() -> None:
    trainer = Trainer()
    trainer.q.support_avx512bf16_for_cpu, trainer.k.support_avx512bf16_for_cpu = True, False
    _, sharing = join(trainer)
    assert not trainer.q.support_avx512bf16_for_cpu
    sharing.part()
    assert trainer.q.support_avx512bf16_for_cpu and not trainer.k.support_avx512bf16_for_cpu


def test_binding_twice_is_once() -> None:
    trainer = Trainer()
    engine, sharing = join(trainer)
    first = {bound.entry.slot.name: bound.absmax.data_ptr() for bound in sharing.bound}
    sharing.bind()
    assert {bound.entry.slot.name: bound.absmax.data_ptr() for bound in sharing.bound} == first
    assert states_twice(trainer, engine) == 0


# ---- what happens later --------------------------------------------------------------------------------------------


def test_a_requantized_weight_goes_into_the_shared_memory(caplog: pytest.LogCaptureFixture) -> None:
    trainer = Trainer()
    engine, sharing = join(trainer)
    parameter = engine.get_parameter("qkv.weight")
    addresses = parameter.data_ptr(), parameter.bnb_quant_state[1].absmax.data_ptr()
    new = nn.Parameter(torch.full_like(trainer.k.weight.data, 7), requires_grad=False)
    new.quant_state = state(ROWS["k"], True, seed=9)
    expected = flat(new.quant_state)
    trainer.k.weight = new
    with caplog.at_level("WARNING", logger="rlpatch"):
        sharing.sync()
    assert "quantized anew" in caplog.text
    assert torch.equal(parameter.data[256:384], new.data) and new.data_ptr() == parameter.data_ptr() + 256
    assert torch.equal(parameter.bnb_quant_state[1].absmax, expected)
    assert new.quant_state.absmax is parameter.bnb_quant_state[1].absmax
    assert (parameter.data_ptr(), parameter.bnb_quant_state[1].absmax.data_ptr()) == addresses
    sharing.verify()


@pytest.mark.parametrize("change", [{"quant_type": "fp4"}, {"blocksize": 128}, {"shape": (2, 128)}, None])
def test_another_kind_of_quantization_is_an_error(change: dict[str, Any] | None) -> None:
    trainer = Trainer()
    _, sharing = join(trainer)
    if change is None:
        trainer.o.weight = nn.Parameter(torch.zeros(ROWS["o"], K))
    else:
        replaced = copy.copy(trainer.o.weight.quant_state)
        trainer.o.weight.quant_state = State(**{**vars(replaced), **change})
    with pytest.raises(SharingError, match=r"o\.weight was quantized differently"):
        sharing.sync()


def test_a_replaced_engine_state_is_found() -> None:
    trainer = Trainer()
    engine, sharing = join(trainer)
    states = engine.get_parameter("o.weight").bnb_quant_state
    states[0].absmax = states[0].absmax.clone()
    with pytest.raises(SharingError, match="replaced its quantization state"):
        sharing.verify()


# ---- refusals ------------------------------------------------------------------------------------------------------


def named(**attributes: Any) -> list[tuple[str, Any]]:
    tensor = nn.Parameter(attributes.pop("data", torch.zeros(4, 1, dtype=torch.uint8)), requires_grad=False)
    for name, value in attributes.items():
        setattr(tensor, name, value)
    return [("q.weight", tensor)]


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (
            named(data=torch.zeros(2, 1, dtype=torch.bfloat16), quant_state=state(1, False)),
            "bnb_4bit_quant_storage='bf",
        ),
        (named(quant_state=None, quant_storage=torch.uint8), "not quantized yet"),
        (named(data=torch.zeros(2, 2, dtype=torch.int8)), "load_in_8bit"),
        (named(quant_state=SimpleNamespace(packing_format_for_cpu=True)), "eval mode"),
        (named(), "none of the trainer's weights"),
        (named(quant_state=state(1, False)), None),
    ],
)
def test_what_cannot_be_shared_is_told_beforehand(tensors: Any, words: str | None) -> None:
    reason = refusal(tensors)
    assert reason is None if words is None else words in reason


def values(trainer: Any) -> dict[str, tuple[Any, Any]]:
    return {
        n: (getattr(trainer, n).weight.data.clone(), getattr(trainer, n).weight.quant_state.absmax.clone())
        for n in ROWS
    }


def broken(what: str) -> tuple[Any, Any]:
    trainer, engine = Trainer(), Engine()
    if what == "experts":
        engine.o.weight.experts_shape = (2, 3, K)
    elif what == "sixteen bits":  # llm_int8_skip_modules=["o"]
        trainer.o.weight = nn.Parameter(torch.zeros(ROWS["o"], K))
    elif what == "part of a fused weight":
        del trainer.k
    elif what == "end of a fused weight":
        del trainer.v
    elif what == "missing":
        del trainer.o
    elif what == "elsewhere":
        del engine.o.weight.pack_factor
    elif what == "twice":  # k serves as v, too

        def load_weights(weights: Any) -> None:
            for name, tensor in weights:
                Engine.load_weights(engine, [(name, tensor)])
                if name == "k.weight":
                    Engine.load_weights(engine, [("v.weight", tensor)])

        engine.load_weights = load_weights
        del trainer.v
    return trainer, engine


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("experts", "experts"),
        ("sixteen bits", r"o\.weight \(float32.*llm_int8_skip_modules"),
        ("part of a fused weight", "does not follow its neighbour"),
        ("end of a fused weight", "has 512 bytes and the trainer's 4-bit weights fill 384"),
        ("missing", r"o\.weight in 4 bits and the trainer does not"),
        ("elsewhere", r"does not hold o\.weight in 4 bits"),
        ("twice", r"k\.weight is a 4-bit weight that cannot be aliased: the loader reads 256 of its 128"),
    ],
)
def test_the_engine_must_hold_exactly_the_trainers_4_bits(what: str, words: str) -> None:
    trainer, engine = broken(what)
    kept = {n: m.weight.data.clone() for n, m in trainer.named_children() if n in ROWS}
    sharing = QuantizedSharing(trainer_slots(trainer), None, flat)
    with pytest.raises(SharingError, match=words):
        sharing.fill(engine, engine.load_weights)
        sharing.bind()
    sharing.part()
    for name, data in kept.items():
        assert torch.equal(getattr(trainer, name).weight.data, data)
        if what != "sixteen bits" or name != "o":
            assert getattr(trainer, name).weight.quant_state.nested


def test_a_quantized_model_is_recognised() -> None:
    assert quantized.has_quantized(Trainer()) and not quantized.has_quantized(nn.Linear(2, 2))


def test_the_words_for_a_vllm_without_bitsandbytes() -> None:
    text = quantized.without_engine("this vLLM has none; pip install vllm-bnb-plugin")
    assert "load_in_4bit" in text and "vllm-bnb-plugin" in text and "16 bits" in text


# ---- the adapters --------------------------------------------------------------------------------------------------


class Loader:
    """Upstream's, as the wrapper sees it."""

    def __init__(self) -> None:
        self.calls = 0

    def load_weights(self, model: Any, model_config: Any) -> None:
        self.calls += 1
        for parameter in model.parameters():
            if quantized.is_packed(parameter):
                parameter.data.fill_(255)
                parameter.bnb_quant_state = {}

    def run(self, model: Any) -> None:
        _bitsandbytes._load_weights(self.load_weights, self, (model, None), {})


def pair_of(trainer: Any, **providers: Any) -> phases.Colocation:
    context = registry.Context(providers={"share_weights": object(), **providers})
    return phases.Colocation(context, trainer_slots(trainer))


@pytest.fixture(autouse=True)
def arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_bitsandbytes, "flat_absmax", flat)


def test_other_engines_load_as_usual() -> None:
    loader = Loader()
    loader.run(Engine())
    assert loader.calls == 1


def test_the_engine_under_construction_is_filled_from_the_trainer() -> None:
    trainer, engine, loader = Trainer(), Engine(), Loader()
    pair = pair_of(trainer)
    with pair.build():
        loader.run(engine)
        assert loader.calls == 0 and isinstance(pair.sharing, QuantizedSharing)
        draft = Engine()
        loader.run(draft)  # a second model beside the policy
    assert loader.calls == 1 and storage_key(draft.o.weight) not in pair.sharing.written
    assert data_twice(trainer, engine) == 0 and states_twice(trainer, engine) == 0


def test_what_the_trainer_lacks_comes_from_disk_and_nothing_else_does() -> None:
    trainer, engine, loader = Trainer(), Engine(), Loader()
    kept = values(trainer)
    del trainer.o
    with pair_of(trainer).build():
        loader.run(engine)
    assert loader.calls == 1 and bool((engine.o.weight == 255).all())
    assert list(engine.qkv.weight.bnb_quant_state) == [0, 1, 2]
    assert all(torch.equal(getattr(trainer, n).weight.data, kept[n][0]) for n in "qkv")


def test_a_refused_pair_loads_from_disk_and_the_trainer_keeps_its_values(caplog: pytest.LogCaptureFixture) -> None:
    trainer, engine = broken("part of a fused weight")
    loader, pair = Loader(), pair_of(trainer)
    kept = {n: getattr(trainer, n).weight.data.clone() for n in ("q", "v", "o")}
    with caplog.at_level("WARNING", logger="rlpatch"), pair.build():
        loader.run(engine)
    assert loader.calls == 1 and pair.sharing is None and "neighbour" in str(pair.refusal)
    assert "quantizes the checkpoint itself" in caplog.text
    for name, data in kept.items():
        assert torch.equal(getattr(trainer, name).weight.data, data)
    assert bool((engine.o.weight == 255).all())


def test_switched_off_loads_as_usual() -> None:
    context = registry.Context(share_weights=False)
    loader = Loader()
    with phases.Colocation(context, trainer_slots(Trainer())).build():
        loader.run(Engine())
    assert loader.calls == 1


def test_the_releases_split_between_vllm_and_its_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    def present(*modules: str) -> None:
        monkeypatch.setattr(_bitsandbytes, "has", lambda module: module in modules)
        for adapter in (bitsandbytes_v0_9, bitsandbytes_v0_28):
            monkeypatch.setattr(adapter, "has", lambda module: module in modules)

    old, new = bitsandbytes_v0_9.ADAPTER, bitsandbytes_v0_28.ADAPTER
    present(_bitsandbytes.IN_TREE, "bitsandbytes")
    assert old.probe() is None and old.relevant() is None and new.probe() is not None
    present("bitsandbytes")
    assert old.probe() is not None and new.probe() is None
    assert "pip install vllm-bnb-plugin" in new.relevant()
    present(_bitsandbytes.PLUGIN)
    assert new.relevant() == old.relevant() == "bitsandbytes is not installed"
    present(_bitsandbytes.PLUGIN, "bitsandbytes")
    assert new.relevant() is None
    assert [patch.module for patch in old.patches(registry.Context())] == [_bitsandbytes.IN_TREE]
    assert [patch.module for patch in new.patches(registry.Context())] == [_bitsandbytes.PLUGIN]


# ---- bitsandbytes itself -------------------------------------------------------------------------------------------


@pytest.fixture
def bnb() -> Any:
    return pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_flat_state_dequantizes_to_the_same_bits(
    bnb: Any, kind: str, blocksize: int, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    torch.manual_seed(0)
    weight = torch.randn(96, 256, dtype=dtype) * 0.05
    data, state = bnb.functional.quantize_4bit(weight, blocksize=blocksize, compress_statistics=True, quant_type=kind)
    before = bnb.functional.dequantize_4bit(data, state)
    state.absmax = _bitsandbytes.flat_absmax(state)
    state.nested, state.offset, state.state2 = False, None, None
    assert state.absmax.dtype == torch.float32 and state.absmax.numel() == weight.numel() // blocksize
    assert torch.equal(bnb.functional.dequantize_4bit(data, state), before)


class RealTrainer(nn.Module):
    def __init__(self, bnb: Any, nested: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, rows in ROWS.items():
            layer = bnb.nn.Linear4bit(
                K, rows * 8, bias=False, compute_dtype=torch.bfloat16, compress_statistics=nested, quant_type="nf4"
            )
            layer.weight = bnb.nn.Params4bit(
                torch.randn(rows * 8, K, dtype=torch.bfloat16), requires_grad=False, quant_type="nf4",
                compress_statistics=nested, module=layer,
            )  # fmt: skip
            self.add_module(name, layer.to("cpu"))


class RealEngine(nn.Module):
    """vLLM's layout and its arithmetic, for q, k and v fused and o."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = {"qkv": ("q", "k", "v"), "o": ("o",)}
        for fused, names in self.parts.items():
            layer = nn.Module()
            size = sum(ROWS[n] for n in names) * 8 * K // 2
            layer.weight = nn.Parameter(torch.zeros(size, 1, dtype=torch.uint8), requires_grad=False)
            layer.weight.pack_factor = 2
            self.add_module(fused, layer)

    def load_weights(self, weights: Any) -> None:
        for name, tensor in weights:
            for fused, names in self.parts.items():
                if (own := name.removesuffix(".weight")) in names:
                    start = sum(ROWS[n] for n in names[: names.index(own)]) * 8 * K // 2
                    self.get_parameter(f"{fused}.weight").data.narrow(0, start, tensor.shape[0]).copy_(tensor)

    def apply_to(self, bnb: Any, fused: str, x: Any) -> Any:
        weight = self.get_parameter(f"{fused}.weight")
        offsets, states = weight.bnb_shard_offsets, weight.bnb_quant_state
        outs = [bnb.matmul_4bit(x, weight[offsets[i] : offsets[i + 1]].t(), states[i]) for i in range(len(states))]
        return torch.cat(outs, -1)


@pytest.mark.parametrize("nested", [False, True])
def test_real_weights_give_the_same_products_on_both_sides(
    bnb: Any, nested: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    trainer, engine = RealTrainer(bnb, nested), RealEngine()
    before = {n: {k: v.clone() for k, v in m.state_dict().items()} for n, m in trainer.named_children()}
    x = torch.randn(5, K, dtype=torch.bfloat16)
    expected = {n: m(x) for n, m in trainer.train().named_children()}
    _, sharing = join(trainer, engine, _bitsandbytes.flat_absmax)
    for name, old in expected.items():
        assert torch.equal(getattr(trainer, name)(x), old)
    assert torch.equal(engine.apply_to(bnb, "qkv", x), torch.cat([expected[n] for n in "qkv"], -1))
    assert torch.equal(engine.apply_to(bnb, "o", x), expected["o"])
    assert data_twice(trainer, engine) == 0 and states_twice(trainer, engine) == 0

    trainer.eval()  # bitsandbytes would repack on CPUs with AVX512-BF16, into memory of its own
    with torch.no_grad():
        for module in trainer.children():
            module(x)
    sharing.sync()
    assert data_twice(trainer, engine) == 0

    sharing.part()
    for name, old in before.items():
        new = getattr(trainer, name).state_dict()
        assert new.keys() == old.keys() and all(torch.equal(new[key], old[key]) for key in old)
