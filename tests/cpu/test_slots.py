"""The trainer's LoRA in vLLM's slots: rollouts follow it, on a real engine of whatever release is installed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from rlpatch.adapters.vllm._lora_slots import ID, LoraSlots  # noqa: E402
from rlpatch.adapters.vllm.lora_slots_v0_12 import ADAPTER  # noqa: E402
from rlpatch.engine import Engine  # noqa: E402
from rlpatch.errors import UsageError  # noqa: E402
from rlpatch.lora.slots import Slots, rank_of  # noqa: E402
from rlpatch.lora.target import Product, Target  # noqa: E402

pytestmark = [pytest.mark.cpu, pytest.mark.timeout(600)]

PROMPTS = [[5, 9, 14, 22], [7, 7, 31]]
CLOSE = 1e-5  # of log-probabilities in fp32


@pytest.fixture(scope="module")
def llm(tiny_model: str) -> Any:
    from vllm import LLM

    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    return LLM(
        tiny_model,
        dtype="float32",
        enforce_eager=True,
        kv_cache_memory_bytes=32 << 20,
        max_model_len=96,
        enable_prefix_caching=True,
        **LoraSlots.engine_arguments(4),
    )


@pytest.fixture
def slots_for(llm: Any) -> Iterator[Any]:
    """``slots_for(targets)`` gives registered `Slots`; unregistered afterwards."""
    made: list[Slots] = []

    def make(targets: list[Target], register: bool = True) -> Slots:
        engine = Engine(llm)
        made.append(Slots(engine, LoraSlots(engine), targets))
        if register:
            made[-1].register()
        return made[-1]

    yield make
    for slots in made:
        slots.remove()
    llm.reset_prefix_cache()


def trainer(path: str, seed: int = 1, **config: Any) -> Any:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", **config}
    model = peft.get_peft_model(model, peft.LoraConfig(**settings))
    randomize(model, seed)
    return model.eval()


def randomize(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def targets_of(model: Any) -> list[Target]:
    targets = []
    for name, layer in model.named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            products = tuple(
                Product(layer.lora_B[a].weight, layer.lora_A[a].weight, layer.scaling[a], a)
                for a in layer.active_adapters
                if a in layer.lora_A
            )
            weight = layer.get_base_layer().weight.detach()
            targets.append(Target(name.removeprefix("base_model.model.") + ".weight", weight, products))
    return targets


def generate(llm: Any, slots: Slots | None) -> list[tuple[list[int], list[float]]]:
    """Greedy tokens and their log-probabilities, for each of PROMPTS."""
    from vllm import SamplingParams

    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in PROMPTS],
        SamplingParams(temperature=0, max_tokens=12, logprobs=1, ignore_eos=True),
        use_tqdm=False,
        lora_request=None if slots is None else slots.request,
    )
    result = []
    for output in outputs:
        tokens = list(output.outputs[0].token_ids)
        steps = zip(tokens, output.outputs[0].logprobs, strict=True)
        result.append((tokens, [step[token].logprob for token, step in steps]))
    return result


@torch.no_grad()
def distance(model: Any, rollouts: list[tuple[list[int], list[float]]]) -> float:
    """Largest gap between the engine's log-probabilities and the trainer's; infinite when a token is not the trainer's."""
    worst = 0.0
    for prompt, (tokens, logprobs) in zip(PROMPTS, rollouts, strict=True):
        logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        if logits.argmax(-1).tolist() != tokens:
            return float("inf")
        mine = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        worst = max(worst, float((mine - torch.tensor(logprobs)).abs().max()))
    return worst


def roll(llm: Any, slots: Slots, model: Any) -> float:
    """One sync and rollout; how far it is from the trainer."""
    slots.update(targets_of(model))
    llm.reset_prefix_cache()
    return distance(model, generate(llm, slots))


def test_this_vllm_has_what_the_adapter_needs() -> None:
    assert ADAPTER.probe is not None and ADAPTER.probe() is None


def test_rollouts_follow_the_adapter(llm: Any, slots_for: Any, tiny_model: str) -> None:
    model = trainer(tiny_model)
    slots = slots_for(targets_of(model))
    with model.disable_adapter():
        base = generate(llm, slots)
        assert distance(model, base) < CLOSE, "before the first update the slot holds zeros"
    buffers = [view.data_ptr() for place in slots._places.values() for view in place.views()]
    assert len(slots._places) == 2 * 7
    seen = {str(base[0][0])}
    for seed in (1, 2, 3):
        randomize(model, seed)
        assert roll(llm, slots, model) < CLOSE
        seen.add(str(generate(llm, slots)[0][0]))
    assert len(seen) == 4, "the values made no difference: this test would not notice a lost update"
    assert generate(llm, None) == base, "a request without the LoRA gets the base model"
    assert [view.data_ptr() for place in slots._places.values() for view in place.views()] == buffers


def test_the_rollout_is_stale_without_an_update(llm: Any, slots_for: Any, tiny_model: str) -> None:
    model = trainer(tiny_model)
    slots = slots_for(targets_of(model))
    assert roll(llm, slots, model) < CLOSE
    randomize(model, 2)
    llm.reset_prefix_cache()
    assert distance(model, generate(llm, slots)) > 100 * CLOSE


def test_merged_weights_agree(llm: Any, slots_for: Any, tiny_model: str) -> None:
    model = trainer(tiny_model)
    slots = slots_for(targets_of(model))
    slots.update(targets_of(model))
    llm.reset_prefix_cache()
    assert distance(model.merge_and_unload(), generate(llm, slots)) < CLOSE


def test_ranks_and_scalings_of_their_own(llm: Any, slots_for: Any, tiny_model: str) -> None:
    wide = trainer(tiny_model, rank_pattern={"q_proj": 8, "down_proj": 1}, alpha_pattern={"k_proj": 3}, use_rslora=True)
    slots = slots_for(targets_of(wide))
    assert roll(llm, slots, wide) < CLOSE
    narrow = trainer(tiny_model, seed=4, r=2, rank_pattern={"v_proj": 5})
    assert roll(llm, slots, narrow) < CLOSE, "what was left beyond the smaller rank still counts"
    assert roll(llm, slots, wide) < CLOSE


def test_adapters_on_some_layers_only(llm: Any, slots_for: Any, tiny_model: str) -> None:
    everywhere = trainer(tiny_model)
    slots = slots_for(targets_of(everywhere))
    assert roll(llm, slots, everywhere) < CLOSE
    some = trainer(tiny_model, seed=5, target_modules=["k_proj", "up_proj"], layers_to_transform=[1])
    assert len(targets_of(some)) == 2
    assert roll(llm, slots, some) < CLOSE, "what other weights had before still counts"
    assert roll(llm, slots, everywhere) < CLOSE


def test_weights_that_were_not_registered_join(llm: Any, slots_for: Any, tiny_model: str) -> None:
    some = trainer(tiny_model, seed=5, target_modules=["v_proj"], layers_to_transform=[0])
    slots = slots_for(targets_of(some))
    assert roll(llm, slots, some) < CLOSE
    assert roll(llm, slots, trainer(tiny_model)) < CLOSE
    assert roll(llm, slots, some) < CLOSE


def test_several_adapters_at_once(llm: Any, slots_for: Any, tiny_model: str) -> None:
    model = trainer(tiny_model)
    model.add_adapter("second", peft.LoraConfig(r=3, lora_alpha=9, target_modules=["q_proj", "o_proj", "gate_proj"]))
    randomize(model, 6)
    model.base_model.set_adapter(["default", "second"])
    model.eval()
    targets = targets_of(model)
    assert rank_of(targets) == 7
    slots = slots_for(targets)
    assert roll(llm, slots, model) < CLOSE
    model.base_model.set_adapter("second")
    assert roll(llm, slots, model) < CLOSE


def test_lm_head(llm: Any, slots_for: Any, tiny_model: str) -> None:
    model = trainer(tiny_model, target_modules=["lm_head", "q_proj"])
    slots = slots_for(targets_of(model))
    assert "lm_head.weight" in slots._places
    assert roll(llm, slots, model) < CLOSE


def test_an_unregistered_adapter_comes_back(llm: Any, slots_for: Any, tiny_model: str) -> None:
    model = trainer(tiny_model)
    slots = slots_for(targets_of(model))
    assert roll(llm, slots, model) < CLOSE
    llm.llm_engine.remove_lora(ID)
    assert roll(llm, slots, model) < CLOSE


def test_pinned(llm: Any, slots_for: Any, tiny_model: str) -> None:
    slots = slots_for(targets_of(trainer(tiny_model)))
    assert ID in slots.mechanism.manager._registered_adapters.pinned_items
    assert ID in slots.mechanism.manager._active_adapters.pinned_items
    assert not os.path.exists(slots.request.lora_path)


def test_too_large_a_rank_is_refused(llm: Any, slots_for: Any, tiny_model: str) -> None:
    large = trainer(tiny_model, r=9)
    slots = slots_for(targets_of(large), register=False)
    assert len(slots.refusals()) == 14
    with pytest.raises(UsageError, match=r"LoraConfig\.r=9 .*max_lora_rank=8; .*max_lora_rank=16"):
        slots.register()
    with pytest.raises(UsageError, match=r"call Slots\.register"):
        _ = slots.request
    model = trainer(tiny_model)
    slots = slots_for(targets_of(model))
    assert roll(llm, slots, model) < CLOSE
    before = generate(llm, slots)
    with pytest.raises(UsageError, match="max_lora_rank=8"):
        slots.update(targets_of(large))
    assert generate(llm, slots) == before, "a refused update changed the slot"


def test_what_has_no_slot_is_refused_by_name(llm: Any, slots_for: Any, tiny_model: str) -> None:
    model = trainer(tiny_model, target_modules=["q_proj"])
    good = targets_of(model)
    a, b = torch.ones(4, 64), torch.ones(64, 4)
    bad = {
        "model.embed_tokens.weight": (b, a, "embeddings have LoRA slots of another layout"),
        "model.layers.0.nowhere.weight": (b, a, "the engine has no LoRA slot"),
        "model.layers.0.mlp.experts.down_proj[3]": (b, a, "one expert of a 3-D parameter"),
        "model.layers.0.self_attn.o_proj.weight": (a.T, b.T, "stored transposed"),
        "model.layers.1.self_attn.o_proj.weight": (torch.ones(65, 4), a, "does not take its shape"),
        "model.layers.0.mlp.up_proj.weight": (torch.ones(90, 4), a, "is larger than the trainer's weight"),
    }
    targets = [Target(name, left @ right, (Product(left, right, 1.0),)) for name, (left, right, _) in bad.items()]
    slots = slots_for([*good, *targets], register=False)
    refusals = slots.refusals()
    assert set(refusals) == set(bad)
    for name, (_, _, why) in bad.items():
        assert why in refusals[name]
    with pytest.raises(UsageError, match=r"embed_tokens.*target_modules"):
        slots.register()


def test_an_engine_that_fills_its_slots_otherwise_is_found_out(
    llm: Any, slots_for: Any, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.lora.lora_weights import LoRALayerWeights

    monkeypatch.setattr(LoRALayerWeights, "optimize", lambda self: self)  # the scaling is lost
    slots = slots_for(targets_of(trainer(tiny_model)), register=False)
    with pytest.raises(UsageError, match="otherwise than rlpatch would"):
        slots.register()
    assert not slots.mechanism.active()


def test_no_host_and_no_disk_after_the_registration(
    llm: Any, slots_for: Any, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trainer(tiny_model)
    slots = slots_for(targets_of(model))

    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("registered again")

    monkeypatch.setattr(slots.mechanism, "register", forbidden)
    assert roll(llm, slots, model) < CLOSE


def test_an_engine_without_lora_is_refused() -> None:
    class Bare:
        runner = object()

    with pytest.raises(UsageError, match="enable_lora=False"):
        LoraSlots(Bare())  # type: ignore[arg-type]
