"""A LoRA on a real trainer/engine pair: what rollouts are made with, and what becomes of the base, whatever happens."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

import rlpatch  # noqa: E402
from rlpatch import phases  # noqa: E402
from rlpatch.demo import tiny, worker  # noqa: E402
from rlpatch.errors import FoldError, StandbyError, UsageError  # noqa: E402
from rlpatch.lora.target import Target  # noqa: E402
from rlpatch.sharing.account import resident_twice  # noqa: E402

pytestmark = [pytest.mark.cpu, pytest.mark.timeout(600)]

PROMPTS = [[5, 9, 13], [7, 8, 9, 10], [20, 21]]
LORA = {"r": 4, "lora_alpha": 8}
FAST = {"learning_rate": 5e-3}


def pair_of(trainer: Any) -> phases.Colocation:
    pair = phases.of_engine(trainer.vllm_generation.llm)
    assert pair is not None and pair.engine is not None
    return pair


def randomize(trainer: Any, seed: int = 1, adapter: str = "default") -> None:
    """Adapters that change every token."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_" in name and f".{adapter}." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def base_of(trainer: Any) -> dict[str, Any]:
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "lora_" not in n}


def same_base(trainer: Any, before: dict[str, Any]) -> bool:
    view = {2: torch.int16, 4: torch.int32}
    return all(
        torch.equal(
            trainer.model.get_parameter(n).detach().view(view[p.element_size()]), p.view(view[p.element_size()])
        )
        for n, p in before.items()
    )


def generate(trainer: Any) -> list[list[int]]:
    """Greedy completions through TRL's own path."""
    generation = trainer.vllm_generation
    generation.temperature = 0.0
    _, completions, _, _ = generation.generate(prompts=PROMPTS, images=None, num_generations=1)
    return [list(ids) for ids in completions]


def direct(trainer: Any) -> list[list[int]]:
    """The same by ``LLM.generate``, TRL knowing nothing of it."""
    from vllm import SamplingParams

    outputs = trainer.vllm_generation.llm.generate(
        [{"prompt_token_ids": prompt} for prompt in PROMPTS],
        SamplingParams(temperature=0, max_tokens=16),
        use_tqdm=False,
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


def reference(path: str, trainer: Any, adapters: tuple[str, ...] = ("default",)) -> list[list[int]]:
    """Greedy completions of the checkpoint on disk with ``B @ A * alpha / r`` added, in fp64, by transformers alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    tensors = {name: p.detach().double() for name, p in trainer.model.named_parameters()}
    with torch.no_grad():
        for adapter in adapters:
            config = trainer.model.peft_config[adapter]
            for name, a in tensors.items():
                if f".lora_A.{adapter}.weight" in name:
                    b = tensors[name.replace(".lora_A.", ".lora_B.")]
                    module = name.removeprefix("base_model.model.").split(".lora_A.")[0]
                    model.get_submodule(module).weight.add_(b @ a, alpha=config.lora_alpha / config.r)
        completions = []
        for prompt in PROMPTS:
            ids = torch.tensor([prompt])
            for _ in range(16):
                ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
                if ids[0, -1] == 2:
                    break
            completions.append(ids[0, len(prompt) :].tolist())
    return completions


def within(monkeypatch: pytest.MonkeyPatch, trainer: Any, action: Any, at: int = 3) -> None:
    """Call `action` in the middle of each generation from now on."""
    kind = type(trainer.vllm_generation.llm.llm_engine)
    original, steps = kind.step, 0

    def step(self: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == at:
            action()
        return original(self)

    monkeypatch.setattr(kind, "step", step)


def differences(trainer: Any) -> list[float]:
    rows = [row for row in trainer.state.log_history if "loss" in row]
    return [row["sampling/sampling_logp_difference/mean"] for row in rows]


@pytest.fixture
def trained(trainer_of: Any) -> Any:
    """``trained(apply, **job)``: a trainer whose LoRA is random."""

    def make(apply: dict[str, Any] | None = None, seed: int = 1, **job: Any) -> Any:
        trainer = trainer_of(
            apply=apply, lora={**LORA, **job.pop("lora", {})}, config={**FAST, **job.pop("config", {})}, **job
        )
        randomize(trainer, seed)
        return trainer

    return make


# ---- rollouts come from the policy ---------------------------------------------------------------------------------


def test_rollouts_are_those_of_an_independent_merge(trained: Any, tiny_model: str) -> None:
    trainer = trained()
    pair = pair_of(trainer)
    assert pair.lora is not None and pair.lora.mode == "fold" and not pair.lora.fell_back
    before = base_of(trainer)
    seen = []
    for seed in (1, 2, 3):
        randomize(trainer, seed)
        trainer.vllm_generation.sync_weights()
        seen.append(generate(trainer))
        assert seen[-1] == reference(tiny_model, trainer)
        assert same_base(trainer, before)
    assert len({str(tokens) for tokens in seen}) == 3, "the values made no difference: a stale rollout would pass"
    assert generate(trainer) == seen[-1]


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gemma3"])
def test_families(trained: Any, family: str, tmp_path: Any) -> None:
    """The trainer's own forward is the reference: fused and transposed weights of the engine (experts: golden suite)."""
    path = str(tiny.write_model(tmp_path, family))
    trainer = trained(model=path)
    trainer.model.eval()
    pair = pair_of(trainer)
    assert pair.lora.mode == "fold" and resident_twice(trainer.model.get_base_model(), pair.engine.model) == 0
    before = base_of(trainer)
    tokens = generate(trainer)
    assert same_base(trainer, before)
    with torch.no_grad():
        for prompt, completion in zip(PROMPTS, tokens, strict=True):
            ids = torch.tensor([prompt + completion])
            assert trainer.model(ids).logits[0, len(prompt) - 1 : -1].argmax(-1).tolist() == completion


def test_what_the_engine_reads_in_bfloat16(trained: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exact sum, rounded once; and the base again afterwards, where a merge and unmerge would have changed it."""
    trainer = trained(model=str(tiny.write_model(tmp_path, "qwen3", dtype="bfloat16")), dtype="bfloat16")
    pair = pair_of(trainer)
    before = base_of(trainer)
    targets = {t.name: (t, t.weight.double() + t.delta().double()) for t in pair.adapters.read().targets}
    seen = []

    def look() -> None:
        for target, total in targets.values():
            ulp = torch.exp2(total.abs().clamp(min=1e-30).log2().floor()) * 2**-7
            assert ((target.weight.double() - total).abs() <= ulp * 0.51 + 1e-6).all()
        engine = pair.engine.model.get_parameter("model.layers.0.mlp.down_proj.weight")
        assert torch.equal(engine, targets["model.layers.0.mlp.down_proj.weight"][0].weight)
        seen.append(True)

    within(monkeypatch, trainer, look)
    generate(trainer)
    assert seen and same_base(trainer, before)
    assert pair.policy.fold.report.kept > 0


def test_training_leaves_the_base_alone(trained: Any, tmp_path: Any) -> None:
    for dtype, limit in (("float32", 2e-6), ("bfloat16", 0.05)):
        path = str(tiny.write_model(tmp_path / dtype, "qwen3", dtype=dtype))
        trainer = trained(model=path, dtype=dtype, steps=4)
        before = base_of(trainer)
        adapters = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "lora_B" in n}
        result = worker.train(trainer, worker.Job(path, True))
        assert same_base(trainer, before), dtype
        assert not any(torch.equal(trainer.model.get_parameter(n), old) for n, old in adapters.items())
        assert result["weights_twice_bytes"] == 0 and result["kv_training_bytes"] == 0
        assert len(differences(trainer)) == 4 and max(differences(trainer)) < limit, dtype
        rlpatch.revert()


def test_the_engine_called_directly(trained: Any, tiny_model: str) -> None:
    trainer = trained()
    before = base_of(trainer)
    assert direct(trainer) == reference(tiny_model, trainer) == generate(trainer)
    randomize(trainer, 5)  # no sync in between
    assert direct(trainer) == reference(tiny_model, trainer)
    assert same_base(trainer, before) and not pair_of(trainer).policy.fold.folded


def test_disabled_adapters_leave_the_base(trained: Any, tiny_model: str) -> None:
    trainer = trained()
    before = base_of(trainer)
    adapted = generate(trainer)
    with trainer.model.disable_adapter():
        assert generate(trainer) == direct(trainer) == reference(tiny_model, trainer, ()) != adapted
        assert same_base(trainer, before)
    assert generate(trainer) == adapted


def test_the_active_adapter_is_followed(trained: Any, tiny_model: str) -> None:
    trainer = trained()
    before = base_of(trainer)
    first = generate(trainer)
    trainer.model.add_adapter("second", peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "up_proj"]))
    randomize(trainer, 7, "second")
    assert generate(trainer) == first
    trainer.model.set_adapter("second")
    assert generate(trainer) == reference(tiny_model, trainer, ("second",)) != first
    trainer.model.base_model.set_adapter(["default", "second"])
    assert generate(trainer) == reference(tiny_model, trainer, ("default", "second"))
    trainer.model.set_adapter("default")
    assert generate(trainer) == first and same_base(trainer, before)


def test_weights_that_were_moved_are_put_back_before_the_fold(
    trained: Any, tiny_model: str, caplog: pytest.LogCaptureFixture
) -> None:
    """``model.to(…)`` after construction, as the second Accelerator of a process does it on a CPU."""
    trainer = trained()
    pair = pair_of(trainer)
    before = base_of(trainer)
    for parameter in trainer.model.parameters():
        parameter.data = parameter.data.clone()
    assert resident_twice(trainer.model, pair.engine.model) > 0
    with caplog.at_level(logging.WARNING, logger="rlpatch"):
        assert generate(trainer) == reference(tiny_model, trainer)
    assert "was put back" in caplog.text
    assert resident_twice(trainer.model, pair.engine.model) == 0 and same_base(trainer, before)
    randomize(trainer, 4)
    assert generate(trainer) == reference(tiny_model, trainer) and same_base(trainer, before)


def test_a_weight_in_somebodys_buffer_is_copied_folded(trained: Any, tiny_model: str) -> None:
    trainer = trained()
    weight = trainer.model.base_model.model.model.layers[0].mlp.down_proj.base_layer.weight
    flat = torch.zeros(2 * weight.numel())
    flat[: weight.numel()] = weight.data.flatten()
    weight.data = flat[: weight.numel()].view(weight.shape)
    before = base_of(trainer)
    for seed in (1, 2):
        randomize(trainer, seed)
        assert generate(trainer) == reference(tiny_model, trainer)
        assert same_base(trainer, before) and weight.data_ptr() == flat.data_ptr()
    assert (
        list(pair_of(trainer).sharing.copied) == ["model.layers.0.mlp.down_proj.weight"]
        or pair_of(trainer).sharing.copied
    )


# ---- who looks at the base in the middle of a rollout --------------------------------------------------------------


def test_state_dict_and_checkpoints_within_a_rollout(
    trained: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    trainer = trained()
    pair = pair_of(trainer)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    seen: dict[str, Any] = {}

    def look() -> None:
        assert pair.policy.fold.folded
        base = base_of(trainer)
        seen["folded"] = sum(not torch.equal(base[name], before[name]) for name in base)
        seen["state"] = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
        trainer.model.save_pretrained(tmp_path / "adapter")
        trainer.model.get_base_model().save_pretrained(tmp_path / "base")

    within(monkeypatch, trainer, look)
    expected = generate(trainer)
    assert seen["folded"] == 14
    assert seen["state"].keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in seen["state"].items())
    saved = load_file(tmp_path / "base" / "model.safetensors")
    plain = {name.replace(".base_layer.", "."): tensor for name, tensor in before.items() if "lora_" not in name}
    compared = 0
    for name, tensor in saved.items():
        original = plain.get("base_model.model." + name.replace(".base_layer.", "."))
        if original is not None and "lora_" not in name:
            assert torch.equal(tensor, original), name
            compared += 1
    assert compared >= 21
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert adapter and all(torch.equal(t, before[n.replace(".weight", ".default.weight")]) for n, t in adapter.items())
    assert generate(trainer) == expected


# ---- whatever goes wrong -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_an_error_within_a_rollout_unfolds(
    trained: Any, failure: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trained()
    pair = pair_of(trainer)
    before = base_of(trainer)
    expected = generate(trainer)

    def fail() -> None:
        assert not same_base(trainer, before)
        raise failure("stop")

    for call in (generate, direct):
        with monkeypatch.context() as patch:
            within(patch, trainer, fail)
            with pytest.raises(failure, match="stop"):
                call(trainer)
        assert not pair.policy.fold.folded and same_base(trainer, before)
        assert pair.standby.released
        assert generate(trainer) == expected


@pytest.fixture
def default_handler() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [2, 14, 15, 28])
def test_ctrl_c_while_folding_or_unfolding(
    trained: Any, number: int, monkeypatch: pytest.MonkeyPatch, default_handler: None
) -> None:
    """14 weights: the deltas up to the 14th are made by the fold, the others by the unfold."""
    trainer = trained()
    before = base_of(trainer)
    expected = generate(trainer)
    made, original = 0, Target.delta

    def delta(self: Target) -> Any:
        nonlocal made
        made += 1
        if made == number:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(Target, "delta", delta)
        with pytest.raises(KeyboardInterrupt):
            generate(trainer)
    assert same_base(trainer, before) and not pair_of(trainer).policy.fold.folded
    assert pair_of(trainer).standby.released
    assert generate(trainer) == expected


@pytest.mark.parametrize("half", ["restore", "release"])
def test_a_kv_cache_that_cannot_come_or_go_leaves_an_unfolded_base(
    trained: Any, half: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trained()
    pair = pair_of(trainer)
    before = base_of(trainer)
    expected = generate(trainer)
    folded = []

    def fail() -> None:
        folded.append(not same_base(trainer, before))
        raise RuntimeError("CUDA Error: out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(pair.standby.mechanism, half, fail)
        with pytest.raises(StandbyError if half == "restore" else RuntimeError, match="out of memory"):
            generate(trainer)
    # what a GPU does while it folds and unfolds comes after the fold and the unfold on a CPU
    assert folded == [half == "restore"]
    assert not pair.policy.fold.folded and same_base(trainer, before)
    assert pair.standby.released is (half == "restore")
    assert generate(trainer) == expected and pair.standby.released


def test_an_adapter_with_an_infinity(trained: Any) -> None:
    trainer = trained()
    before = base_of(trainer)
    expected = generate(trainer)
    layer = trainer.model.base_model.model.model.layers[1].mlp.up_proj
    kept = layer.lora_B["default"].weight[0, 0].item()
    with torch.no_grad():
        layer.lora_B["default"].weight[0, 0] = float("inf")
    with pytest.raises(FoldError, match=r"^model\.layers\.1\.mlp\.up_proj\.weight: base \+ adapter"):
        generate(trainer)
    assert same_base(trainer, before) and pair_of(trainer).standby.released
    with torch.no_grad():
        layer.lora_B["default"].weight[0, 0] = kept
    assert generate(trainer) == expected


def test_an_adapter_that_cannot_be_folded_is_made_active(trained: Any) -> None:
    trainer = trained()
    before = base_of(trainer)
    expected = generate(trainer)
    trainer.model.add_adapter("dora", peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    trainer.model.set_adapter("dora")
    with pytest.raises(FoldError, match="the active adapters changed and cannot be folded"):
        generate(trainer)
    assert same_base(trainer, before)
    trainer.model.set_adapter("default")
    assert generate(trainer) == expected


def test_revert_between_steps_leaves_plain_trl(trained: Any) -> None:
    from transformers import TrainerCallback

    trainer = trained(steps=4)
    pair = pair_of(trainer)
    before = base_of(trainer)
    seen = []

    class Revert(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2:
                assert same_base(trainer, before)
                rlpatch.revert()
                seen.append(resident_twice(trainer.model, pair.engine.model))

    trainer.add_callback(Revert())
    trainer.train()
    assert seen and seen[0] > 0 and phases.live() == []
    assert len(differences(trainer)) == 4 and max(differences(trainer)) < 2e-6
    assert not any(module._state_dict_hooks for module in trainer.model.modules()), "the hooks are off"


def test_revert_within_a_rollout(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trained()
    before = base_of(trainer)
    within(monkeypatch, trainer, rlpatch.revert)
    generate(trainer)
    monkeypatch.undo()
    assert same_base(trainer, before) and phases.live() == []


# ---- the ways ------------------------------------------------------------------------------------------------------


def run(trained: Any, mode: str, **changes: Any) -> tuple[str, list[dict[str, Any]]]:
    trainer = trained({"lora": mode}, steps=3, **changes)
    pair = pair_of(trainer)
    result = worker.train(trainer, worker.Job("", True))
    taken = pair.lora.mode
    rlpatch.revert()
    return taken, result["steps"]


def test_the_ways_agree(trained: Any) -> None:
    taken, fold = run(trained, "fold")
    assert taken == "fold" and len(fold) == 3
    for mode in ("slots", "merge"):
        taken, other = run(trained, mode)
        assert taken == mode
        for a, b in zip(fold, other, strict=True):
            assert b == pytest.approx(a, abs=1e-5), mode


@pytest.mark.parametrize("setting", ["slots", "merge"])
def test_setting_by_the_environment(
    trained: Any, setting: str, monkeypatch: pytest.MonkeyPatch, tiny_model: str
) -> None:
    monkeypatch.setenv("RLPATCH_LORA", setting)
    trainer = trained()
    assert pair_of(trainer).lora.mode == setting
    trainer.vllm_generation.sync_weights()
    assert generate(trainer) == reference(tiny_model, trainer)


def test_an_argument_wins_over_the_environment(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLPATCH_LORA", "merge")
    assert pair_of(trained({"lora": "fold"})).lora.mode == "fold"


def test_nonsense_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"nonsense.*auto.*fold.*slots.*merge"):
        rlpatch.apply(lora="nonsense")
    monkeypatch.setenv("RLPATCH_LORA", "nonsense")
    with pytest.raises(UsageError, match="nonsense"):
        rlpatch.apply()
    monkeypatch.undo()
    rlpatch.revert()


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.message for r in caplog.records if "LoRA by" in r.message and r.levelno == logging.WARNING]


def test_dora_falls_back_to_the_merge(trained: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="rlpatch"):
        trainer = trained(lora={"use_dora": True, "target_modules": ["q_proj", "v_proj"]}, steps=3)
        trainer.train()
    assert (
        len(told(caplog)) == 1
        and "LoRA by merge" in told(caplog)[0]
        and "more than a low-rank delta" in told(caplog)[0]
    )
    pair = pair_of(trainer)
    assert pair.lora.mode == "merge" and not pair.shares and pair.standby.released
    assert len(differences(trainer)) == 3 and max(differences(trainer)) < 1e-5


def test_no_sharing_means_slots(trained: Any, caplog: pytest.LogCaptureFixture, tiny_model: str) -> None:
    with caplog.at_level(logging.WARNING, logger="rlpatch"):
        trainer = trained({"share_weights": False})
    pair = pair_of(trainer)
    assert pair.lora.mode == "slots" and "share_weights is off" in pair.lora.reason
    assert len(told(caplog)) == 1
    trainer.vllm_generation.sync_weights()
    assert generate(trainer) == reference(tiny_model, trainer)
    randomize(trainer, 9)
    trainer.vllm_generation.sync_weights()
    assert generate(trainer) == reference(tiny_model, trainer)


def test_an_adapter_on_a_tied_embedding(trained: Any, tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Folded it would change the head, too; and vLLM's slots for embeddings are of another layout."""
    path = str(tiny.write_model(tmp_path, "qwen3-tied"))
    with caplog.at_level(logging.WARNING, logger="rlpatch"):
        trainer = trained(model=path, lora={"target_modules": ["embed_tokens", "q_proj"]}, steps=1)
    assert len(told(caplog)) == 1
    assert "LoRA by merge" in told(caplog)[0] and "tied" in told(caplog)[0] and "embeddings" in told(caplog)[0]
    trainer.train()
