"""PEFT's adapters as low-rank products: the same deltas as PEFT's own, the names that the model had without them."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from peft import LoraConfig, get_peft_model  # noqa: E402
from peft.tuners.lora import LoraLayer  # noqa: E402

from rlpatch.adapters.peft.lora_v0_14 import ADAPTER, PeftLora  # noqa: E402
from rlpatch.errors import FoldError, UsageError  # noqa: E402
from rlpatch.lora.fold import ReversibleFold  # noqa: E402
from rlpatch.lora.policy import FoldPolicy, choose  # noqa: E402
from rlpatch.lora.target import Adaptation, Product, Target  # noqa: E402

SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
needs_parameters = pytest.mark.skipif(
    "target_parameters" not in LoraConfig.__dataclass_fields__, reason="this PEFT adapts no parameters"
)


def qwen3(**changes: Any) -> Any:
    config = transformers.Qwen3Config(
        vocab_size=40, intermediate_size=48, **{"tie_word_embeddings": False, **SMALL, **changes}
    )
    return transformers.Qwen3ForCausalLM(config)


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=40, n_embd=32, n_layer=2, n_head=2, n_positions=32, tie_word_embeddings=False
        )
    )


def qwen3_moe() -> Any:
    config = transformers.Qwen3MoeConfig(
        vocab_size=40, intermediate_size=48, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2,
        tie_word_embeddings=False, **SMALL,
    )  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(config)


def mixtral() -> Any:
    config = transformers.MixtralConfig(
        vocab_size=40,
        intermediate_size=48,
        num_local_experts=3,
        num_experts_per_tok=2,
        tie_word_embeddings=False,
        **SMALL,
    )
    return transformers.MixtralForCausalLM(config)


def adapted(model: Any, dtype: Any = torch.float32, autocast: bool = True, seed: int = 0, **config: Any) -> Any:
    """`model` with random adapters of `dtype`'s base."""
    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **config}
    return randomize(get_peft_model(model.to(dtype), LoraConfig(**settings), autocast_adapter_dtype=autocast))


def randomize(model: Any, seed: int = 1) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def plain_state(model: Any) -> dict[str, Any]:
    """Plain name -> the parameter that the adapted model uses."""
    names = PeftLora(model).names()
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    return {plain: tensors[full] for full, plain in names.items()}


KINDS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "all-linear": (qwen3, {}),
    "lm_head": (qwen3, {"target_modules": ["lm_head", "q_proj"]}),
    "embedding": (qwen3, {"target_modules": ["embed_tokens", "v_proj"]}),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}),
    "gpt2-embedding": (gpt2, {"target_modules": ["wte", "wpe", "c_attn"], "fan_in_fan_out": True}),
    "rslora": (qwen3, {"use_rslora": True}),
    "patterns": (qwen3, {"rank_pattern": {"q_proj": 9, "down_proj": 1}, "alpha_pattern": {"k_proj": 3, "o_proj": 50}}),
    "some-layers": (qwen3, {"target_modules": ["k_proj", "up_proj"], "layers_to_transform": [1]}),
    "modules-to-save": (qwen3, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
}
MOE: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "qwen3-moe": (qwen3_moe, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "qwen3-moe-reversed": (qwen3_moe, {"target_modules": [], "target_parameters": EXPERTS[::-1]}),
    "qwen3-moe-one": (qwen3_moe, {"target_modules": ["q_proj"], "target_parameters": EXPERTS[1:], "use_rslora": True}),
    "qwen3-moe-gate": (qwen3_moe, {"target_modules": ["q_proj"], "target_parameters": ["mlp.gate.weight", EXPERTS[0]]}),
    "mixtral": (mixtral, {"target_modules": ["v_proj"], "target_parameters": EXPERTS}),
}


def cases() -> list[Any]:
    marked = [pytest.param(*value, id=key, marks=needs_parameters) for key, value in MOE.items()]
    return [*(pytest.param(*value, id=key) for key, value in KINDS.items()), *marked]


def peft_deltas(model: Any) -> dict[int, Any]:
    """Address of a weight -> the sum of PEFT's own deltas of its active adapters, in fp32."""
    found: dict[int, Any] = {}
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            weight = getattr(layer.get_base_layer(), getattr(layer, "parameter_name", "weight"))
            for adapter in layer.active_adapters:
                if adapter in layer.lora_A or adapter in layer.lora_embedding_A:
                    delta = layer.get_delta_weight(adapter).float()
                    found[weight.data_ptr()] = found.get(weight.data_ptr(), 0) + delta
    return found


def check_deltas(model: Any, *, tolerance: float = 1e-6) -> Adaptation:
    """Every target against PEFT's delta and against what ``merge_adapter`` does to a copy of the model."""
    adaptation = PeftLora(model).read()
    assert not adaptation.refused
    state = plain_state(model)
    expected = peft_deltas(model)
    merged = copy.deepcopy(model)
    merged.merge_adapter()
    after = plain_state(merged)
    ours = {name: tensor.detach().clone() for name, tensor in state.items()}
    changed = set()
    with torch.no_grad():
        for target in adaptation.targets:
            whole = state[target.parameter]
            assert target.weight.dtype == whole.dtype and target.weight.dim() == 2
            if target.name == target.parameter:
                part = slice(None)
                assert target.weight.data_ptr() == whole.data_ptr() and target.weight.shape == whole.shape
            else:
                part = int(target.name.removeprefix(target.parameter)[1:-1])
                assert target.weight.data_ptr() == whole[part].data_ptr()
            theirs = expected[whole.data_ptr()][part]
            assert theirs.abs().max() > 0.01, "a zero delta would prove nothing"
            assert torch.allclose(target.delta(), theirs, atol=tolerance, rtol=tolerance), target.name
            ours[target.parameter][part] += target.delta().to(whole.dtype)
            changed.add(target.parameter)
    assert {state[name].data_ptr() for name in changed} == set(expected), "a delta of PEFT's has no target"
    for name, tensor in after.items():
        assert torch.allclose(ours[name].float(), tensor.float(), atol=4 * tolerance, rtol=4 * tolerance), name
        assert torch.equal(tensor, state[name]) == (name not in changed), name
    return adaptation


@pytest.mark.parametrize(("make", "config"), cases())
def test_deltas_are_pefts(make: Any, config: dict[str, Any]) -> None:
    adaptation = check_deltas(adapted(make(), **config))
    assert adaptation.targets and adaptation.adapters == ("default",) and not adaptation.unfoldable
    assert len({target.name for target in adaptation.targets}) == len(adaptation.targets)
    assert all(target.frozen for target in adaptation.targets)


@pytest.mark.parametrize(("make", "config"), cases())
def test_deltas_of_bf16_adapters(make: Any, config: dict[str, Any]) -> None:
    model = adapted(make(), torch.bfloat16, autocast=False, **config)
    products = [product for target in PeftLora(model).read().targets for product in target.products]
    assert all(product.left.dtype == product.right.dtype == torch.bfloat16 for product in products)
    check_deltas(model, tolerance=2e-2)


@pytest.mark.parametrize(("make", "config"), cases())
def test_folded_weights_compute_what_the_adapters_do(make: Any, config: dict[str, Any]) -> None:
    """End to end: a fold, the base model's forward, an unfold."""
    model = adapted(make(), **config).eval()
    before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    ids = torch.arange(12)[None] % 40
    policy = FoldPolicy(PeftLora(model).read)
    with torch.no_grad():
        expected = model(ids).logits
        policy.put()
        with model.disable_adapter():
            # the trained copies stay in use: they are part of the policy
            for module in model.modules():
                if type(module).__name__ == "ModulesToSaveWrapper":
                    module.enable_adapters(True)
            got = model(ids).logits
            base = None
        policy.take_out()
        with model.disable_adapter():
            base = model(ids).logits
    assert torch.allclose(got, expected, atol=2e-5)
    assert (base - expected).abs().max() > 1e-2
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_two_active_adapters() -> None:
    model = adapted(qwen3())
    model.add_adapter("second", LoraConfig(r=3, lora_alpha=9, target_modules=["q_proj", "o_proj"], use_rslora=True))
    randomize(model, 2)
    model.base_model.set_adapter(["default", "second"])
    adaptation = check_deltas(model)
    assert adaptation.adapters == ("default", "second")
    assert sorted({len(target.products) for target in adaptation.targets}) == [1, 2]
    model.base_model.set_adapter("second")
    adaptation = check_deltas(model)
    assert adaptation.adapters == ("second",) and len(adaptation.targets) == 4


@needs_parameters
def test_two_active_adapters_on_experts() -> None:
    model = adapted(qwen3_moe(), target_modules=["q_proj"], target_parameters=EXPERTS)
    try:
        model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], target_parameters=EXPERTS))
    except ValueError as error:
        pytest.skip(str(error))
    randomize(model, 2)
    model.base_model.set_adapter(["default", "second"])
    assert {len(target.products) for target in check_deltas(model).targets} == {2}


# ---- which adapters are active -------------------------------------------------------------------------------------


def test_disabled_adapters_give_nothing() -> None:
    model = adapted(qwen3())
    lora = PeftLora(model)
    assert lora.read().targets
    with model.disable_adapter():
        assert lora.read() == Adaptation(())
    assert lora.read().targets


def test_merged_adapters_give_nothing() -> None:
    model = adapted(qwen3())
    lora = PeftLora(model)
    model.merge_adapter()
    assert lora.read() == Adaptation(())
    model.unmerge_adapter()
    assert len(lora.read().targets) == 14


def test_a_reader_follows_what_becomes_of_the_adapters() -> None:
    model = adapted(qwen3(), target_modules=["q_proj"])
    lora = PeftLora(model)
    assert lora.read().adapters == ("default",)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["up_proj"]))
    randomize(model)
    assert lora.read().adapters == ("default",)
    model.set_adapter("second")
    assert {target.name.split(".")[-2] for target in lora.read().targets} == {"up_proj"}
    model.delete_adapter("second")
    model.add_adapter("second", LoraConfig(r=2, target_modules=["down_proj"]))  # under a name that was there before
    model.set_adapter("second")
    assert {target.name.split(".")[-2] for target in lora.read().targets} == {"down_proj"}


def test_values_are_read_anew() -> None:
    model = adapted(qwen3())
    lora = PeftLora(model)
    before = lora.read().targets[0].delta()
    randomize(model, 5)
    assert not torch.equal(lora.read().targets[0].delta(), before)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.scaling["default"] *= 2
    check_deltas(model)


def test_a_weight_that_is_trained_is_not_frozen() -> None:
    model = adapted(qwen3(), target_modules=["q_proj"])
    model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight.requires_grad_(True)
    assert [target.frozen for target in PeftLora(model).read().targets] == [False, True]


def test_the_model_inside_a_peft_model_will_do() -> None:
    model = adapted(qwen3())
    inner = PeftLora(model.base_model.model)
    assert {t.name for t in inner.read().targets} == {t.name for t in PeftLora(model).read().targets}
    assert set(inner.names().values()) == set(PeftLora(model).names().values())


def test_adapted() -> None:
    model = qwen3()
    assert not PeftLora.adapted(model)
    assert PeftLora.adapted(adapted(model))


# ---- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "config"), cases())
def test_names_are_the_models_own(make: Any, config: dict[str, Any]) -> None:
    model = make()
    own = [*(n for n, _ in model.named_parameters(remove_duplicate=False)), *(n for n, _ in model.named_buffers())]
    shapes = {name: tensor.shape for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    model = adapted(model, **config)
    names = PeftLora(model).names()
    assert sorted(names.values()) == sorted(own)
    for full, plain in names.items():
        tensor = model.get_parameter(full) if full in dict(model.named_parameters()) else model.get_buffer(full)
        assert tensor.shape == shapes[plain]
        assert "lora_" not in full and "original_module" not in full
    assert {target.parameter for target in PeftLora(model).read().targets} <= set(own)


def test_saved_modules_take_the_originals_name() -> None:
    model = adapted(qwen3(), target_modules=["q_proj"], modules_to_save=["lm_head"])
    names = {plain: full for full, plain in PeftLora(model).names().items()}
    assert names["lm_head.weight"] == "base_model.model.lm_head.modules_to_save.default.weight"
    assert model.get_parameter(names["lm_head.weight"]).requires_grad
    with model.disable_adapter():
        names = {plain: full for full, plain in PeftLora(model).names().items()}
        assert names["lm_head.weight"] == "base_model.model.lm_head.original_module.weight"


def test_names_of_tied_weights() -> None:
    model = qwen3(tie_word_embeddings=True)
    own = {n for n, _ in model.named_parameters(remove_duplicate=False)}
    names = set(PeftLora(adapted(model)).names().values())
    assert own <= names <= own | {n for n, _ in model.named_buffers()}


# ---- refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "name", "reason"),
    [
        ({"use_dora": True}, "model.layers.0.self_attn.q_proj", "Dora|DoRA"),
        ({"lora_bias": True}, "model.layers.0.self_attn.q_proj", "lora_bias"),
        ({"trainable_token_indices": [1, 3]}, "model.embed_tokens", "trainable_token_indices"),
    ],
)
def test_more_than_a_low_rank_delta_is_refused(config: dict[str, Any], name: str, reason: str) -> None:
    if not config.keys() <= LoraConfig.__dataclass_fields__.keys():
        pytest.skip("not in this PEFT")
    # lora_bias needs a bias to change
    adaptation = PeftLora(adapted(qwen3(attention_bias=True), **{"target_modules": ["q_proj"], **config})).read()
    assert name in adaptation.refused
    assert re.search(reason, adaptation.refused[name])
    assert not {target.parameter for target in adaptation.targets} & {
        f"{refused}.weight" for refused in adaptation.refused
    }


def test_refused_only_while_it_is_active() -> None:
    model = adapted(qwen3(), target_modules=["q_proj"])
    model.add_adapter("dora", LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    lora = PeftLora(model)
    assert not lora.read().refused
    model.set_adapter("dora")
    assert len(lora.read().refused) == 2 and not lora.read().targets
    policy = FoldPolicy(lora.read)
    with pytest.raises(
        FoldError, match=r"the active adapters changed and cannot be folded: model\.layers\.0.* and 1 more"
    ):
        policy.put()
    model.set_adapter("default")
    policy.put()
    policy.take_out()


def test_other_tuners_are_refused() -> None:
    config = peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    )
    model = get_peft_model(qwen3(), config)
    adaptation = PeftLora(model).read()
    assert set(adaptation.refused) == {
        f"model.layers.{i}.{part}" for i in (0, 1) for part in ("self_attn.k_proj", "mlp.down_proj")
    }
    assert all("ia3" in why for why in adaptation.refused.values())


def test_convolutions_are_refused() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(4, 4, 3)
            self.linear = torch.nn.Linear(4, 4)

    adaptation = PeftLora(get_peft_model(Net(), LoraConfig(r=2, target_modules=["conv", "linear"]))).read()
    assert list(adaptation.refused) == ["conv"] and "Conv2d" in adaptation.refused["conv"]
    assert [target.name for target in adaptation.targets] == ["linear.weight"]


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_an_adapter_on_one_of_two_tied_weights_cannot_be_folded(module: str) -> None:
    adaptation = PeftLora(adapted(qwen3(tie_word_embeddings=True), target_modules=[module, "q_proj"])).read()
    name = {"embed_tokens": "model.embed_tokens.weight", "lm_head": "lm_head.weight"}[module]
    assert list(adaptation.unfoldable) == [name]
    assert (
        "model.embed_tokens.weight" in adaptation.unfoldable[name] and "lm_head.weight" in adaptation.unfoldable[name]
    )
    assert {target.name for target in adaptation.targets} > {name}, "slots may serve it"
    assert not adaptation.refused
    untied = PeftLora(adapted(qwen3(), target_modules=[module, "q_proj"])).read()
    assert not untied.unfoldable


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_a_trained_copy_of_a_tied_weight_is_refused(module: str) -> None:
    config = {"target_modules": ["q_proj"], "modules_to_save": [module]}
    adaptation = PeftLora(adapted(qwen3(tie_word_embeddings=True), **config)).read()
    assert len(adaptation.refused) == 1
    assert "keeps tied" in next(iter(adaptation.refused.values()))
    assert not PeftLora(adapted(qwen3(), **config)).read().refused


@pytest.mark.skipif("ensure_weight_tying" not in LoraConfig.__dataclass_fields__, reason="not in this PEFT")
def test_weights_that_peft_keeps_tied() -> None:
    """``ensure_weight_tying``: one trained copy for both names is fine; two adapters on one weight are not foldable."""
    saved = adapted(
        qwen3(tie_word_embeddings=True),
        target_modules=["q_proj"],
        modules_to_save=["lm_head"],
        ensure_weight_tying=True,
    )
    assert not PeftLora(saved).read().refused
    state = plain_state(saved)
    assert state["lm_head.weight"] is state["model.embed_tokens.weight"] and state["lm_head.weight"].requires_grad
    both = adapted(
        qwen3(tie_word_embeddings=True), target_modules=["lm_head", "embed_tokens"], ensure_weight_tying=True
    )
    assert set(PeftLora(both).read().unfoldable) == {"lm_head.weight", "model.embed_tokens.weight"}


def test_the_probe_accepts_this_peft() -> None:
    assert ADAPTER.probe is not None and ADAPTER.probe() is None


# ---- the choice ----------------------------------------------------------------------------------------------------

GOOD = Target("a.weight", torch.zeros(2, 2), (Product(torch.zeros(2, 1), torch.zeros(1, 2), 1.0),), "a.weight")
ADAPTATIONS = {
    "fine": Adaptation((GOOD,)),
    "refused": Adaptation((), refused={"a": "DoRA is more", "b": "DoRA is more"}),
    "tied": Adaptation((GOOD,), unfoldable={"a.weight": "its weight is tied"}),
    "float8": Adaptation((Target("f.weight", torch.zeros(2, 2, dtype=torch.float8_e4m3fn), GOOD.products),)),
}
WHY = {"refused": "a and 1 more: DoRA is more", "tied": "a.weight: its weight is tied", "float8": "f.weight has dtype"}


@pytest.mark.parametrize("wanted", ["auto", "fold", "slots", "merge"])
@pytest.mark.parametrize("kind", list(ADAPTATIONS))
@pytest.mark.parametrize("cannot_share", [None, "the optimizer keeps them"])
@pytest.mark.parametrize("cannot_slot", [None, "this vLLM has none"])
@pytest.mark.parametrize("quantized", [False, True])
def test_choice(wanted: str, kind: str, cannot_share: str | None, cannot_slot: str | None, quantized: bool) -> None:
    """The whole table."""

    def decide() -> Any:
        return choose(
            wanted, ADAPTATIONS[kind], cannot_share=cannot_share, cannot_slot=cannot_slot, quantized=quantized
        )

    cannot_fold = WHY.get(kind)
    if quantized:
        cannot_fold = "the base is quantized"
    elif cannot_share is not None and kind not in ("refused", "tied"):
        cannot_fold = cannot_share
    if quantized and (wanted in ("fold", "merge") or cannot_slot is not None):
        with pytest.raises(UsageError, match="quantized") as caught:
            decide()
        assert wanted in ("auto", "slots") or f"lora='{wanted}'" in str(caught.value)
        assert wanted in ("fold", "merge") or "this vLLM has none" in str(caught.value)
        return
    choice = decide()
    if wanted == "merge":
        assert (choice.mode, choice.fell_back) == ("merge", False)
    elif wanted == "slots":
        assert choice.mode == ("merge" if cannot_slot else "slots") and choice.fell_back == bool(cannot_slot)
        assert cannot_slot is None or cannot_slot in choice.reason
    elif cannot_fold is None:
        assert (choice.mode, choice.fell_back) == ("fold", False)
    else:
        expected = "slots" if wanted == "auto" and cannot_slot is None else "merge"
        assert (choice.mode, choice.fell_back) == (expected, True)
        assert cannot_fold in choice.reason
        assert wanted == "fold" or cannot_slot is None or cannot_slot in choice.reason
    assert "\n" not in choice.reason


# ---- state_dict while the policy is in place -----------------------------------------------------------------------


@pytest.mark.parametrize(("make", "config"), cases())
def test_state_dict_holds_the_unfolded_base(make: Any, config: dict[str, Any]) -> None:
    model = adapted(make(), **config)
    before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    lora = PeftLora(model)
    policy = FoldPolicy(lora.read)
    parameters = {target.parameter for target in lora.read().targets}
    policy.guard(list(model.modules()))
    policy.put()
    plain = plain_state(model)
    full = {plain_name: full_name for full_name, plain_name in lora.names().items()}
    assert all(not torch.equal(plain[name], before[full[name]]) for name in parameters)
    state = model.state_dict()
    assert list(state) == list(before)
    assert all(torch.equal(state[name], before[name]) for name in before)
    inner = model.base_model.model.state_dict(prefix="x.")
    assert all(torch.equal(inner[f"x.{name.removeprefix('base_model.model.')}"], before[name]) for name in before)
    policy.unguard()
    state = model.state_dict()
    assert not all(torch.equal(state[name], before[name]) for name in before), "the hooks are off"
    policy.take_out()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_putting_again_after_an_interrupted_take_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C between the rollout and its unfold: the next rollout starts from the unfolded base."""
    model = adapted(qwen3(), torch.bfloat16)
    before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    policy = FoldPolicy(PeftLora(model).read)
    policy.put()
    folded = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    policy.put()
    assert all(torch.equal(tensor, folded[name]) for name, tensor in model.state_dict().items())
    policy.take_out()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert isinstance(policy.fold, ReversibleFold) and policy.fold.cycles == 2
    assert policy.describe()["mode"] == "fold" and policy.describe()["weights"] == 14


def test_all_combinations_of_kinds_on_one_model() -> None:
    """Linear, embedding, head and a trained copy side by side, with every pair of settings."""
    for rslora, patterns in itertools.product((False, True), repeat=2):
        config: dict[str, Any] = {
            "target_modules": ["embed_tokens", "q_proj", "down_proj"],
            "modules_to_save": ["lm_head"],
        }
        config["use_rslora"] = rslora
        if patterns:
            config["rank_pattern"], config["alpha_pattern"] = {"embed_tokens": 7}, {"down_proj": 1}
        check_deltas(adapted(qwen3(), **config))
