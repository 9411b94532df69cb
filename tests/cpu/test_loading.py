"""`rlpatch.load`: a model with its engine attached, alone and in a trainer, on real vLLM and TRL."""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

import rlpatch  # noqa: E402
from rlpatch import loading, phases  # noqa: E402
from rlpatch.demo import tiny, worker  # noqa: E402
from rlpatch.errors import SharingError, UsageError  # noqa: E402
from rlpatch.sharing.account import resident_twice  # noqa: E402

pytestmark = [pytest.mark.cpu, pytest.mark.timeout(600)]

PROMPTS = [[5, 9, 14, 22], [7, 7, 31], [40, 3, 11, 12, 13, 50]]
ENGINE: dict[str, Any] = {"enforce_eager": True, "kv_cache_memory_bytes": 32 << 20}
NEW = 12


@pytest.fixture
def load(tiny_model: str) -> Iterator[Callable[..., Any]]:
    """``load(apply={…}, **arguments)`` gives the model; rlpatch is reverted afterwards."""

    def make(path: str | None = None, apply: dict[str, Any] | None = None, **arguments: Any) -> Any:
        if apply is not None:
            rlpatch.apply(**apply)
        arguments = {"max_seq_length": 96, **ENGINE, **arguments}
        return rlpatch.load(path or tiny_model, **arguments)[0]

    yield make
    rlpatch.revert()


def fast(model: Any, prompts: list[list[int]] = PROMPTS, **arguments: Any) -> list[list[int]]:
    """Greedy tokens of the engine."""
    from vllm import SamplingParams

    outputs = model.fast_generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True),
        use_tqdm=False,
        **arguments,
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


@torch.no_grad()
def greedy(model: Any, prompts: list[list[int]] = PROMPTS) -> list[list[int]]:
    """Greedy tokens of the trainer's own forward pass."""
    found = []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(NEW):
            logits = model(torch.tensor([tokens], device=model.device)).logits[0, -1]
            tokens.append(int(logits.argmax()))
        found.append(tokens[len(prompt) :])
    return found


def adapted(model: Any, seed: int = 1, **config: Any) -> Any:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **config}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**settings)).eval()
    randomize(wrapped, seed)
    return wrapped


def randomize(model: Any, seed: int, adapter: str = "default") -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and f".{adapter}." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def frozen(model: Any) -> dict[str, Any]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}


def other_trainer(tiny_model: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


def engines_built(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    from vllm import LLM

    built: list[Any] = []
    original = LLM.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        built.append(self)
        original(self, *args, **kwargs)

    monkeypatch.setattr(LLM, "__init__", init)
    return built


# ---- loading -----------------------------------------------------------------------------------------------------


def test_the_engine_shares_and_follows_the_model(load: Any, tiny_model: str) -> None:
    model = load()
    (pair,) = phases.live()
    assert rlpatch.status().applied, "load applies by itself"
    assert resident_twice(model, pair.engine.model) == 0 and pair.sharing.report().copied == {}
    assert pair.standby is not None and pair.standby.mechanism.resident_bytes() == 0
    first = fast(model)
    assert first == greedy(model) == greedy(other_trainer(tiny_model))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.copy_(parameter.roll(1, 0) * 1.5)
    assert fast(model) == greedy(model) != first
    assert pair.standby.mechanism.resident_bytes() == 0


def test_text_in_text_out_and_a_tokenizer(tiny_model: str, load: Any) -> None:
    rlpatch.apply()
    model, tokenizer = rlpatch.load(Path(tiny_model), max_seq_length=96, **ENGINE)
    assert tokenizer.padding_side == "left" and tokenizer.pad_token is not None
    (output,) = model.fast_generate(["w1 w2 w3"], use_tqdm=False)
    assert output.prompt_token_ids == tokenizer("w1 w2 w3")["input_ids"] and output.outputs[0].text
    assert phases.live()[0].engine.llm.llm_engine.model_config.max_model_len == 96


def test_the_checkpoints_dtype_and_a_given_one(load: Any, tmp_path: Path) -> None:
    half = str(tiny.write_model(tmp_path / "half", dtype="bfloat16"))
    for given, found in ((None, torch.bfloat16), ("float32", torch.float32), (torch.float16, torch.float16)):
        model = load(half, dtype=given)
        pair = phases.of_trainer(model)
        assert pair is not None and {p.dtype for p in model.parameters()} == {found}
        assert pair.engine.llm.llm_engine.model_config.dtype == found and resident_twice(model, pair.engine.model) == 0


def test_the_environment_is_left_as_it_was(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    load()
    changed = {name for name in {*before, *os.environ} if before.get(name) != os.environ.get(name)}
    assert not changed & {"VLLM_ENABLE_V1_MULTIPROCESSING", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"}


def test_a_failing_engine_leaves_the_model_its_own_memory(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    seen: list[Any] = []
    original = AutoModelForCausalLM.from_pretrained.__func__

    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(original(cls, *args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", classmethod(from_pretrained))
    rlpatch.apply()

    def broken(self: Any) -> None:
        filled.append(resident_twice(seen[0], self.engine_model))
        raise RuntimeError("out of memory, say")

    from rlpatch.sharing.share import Sharing

    filled: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(Sharing, "verify", broken)
        with pytest.raises(RuntimeError, match="out of memory, say"):
            load()
    assert filled == [0], "it failed after the weights were shared"
    (model,) = seen
    assert phases.live() == [] and not hasattr(model, "fast_generate")
    again = load()
    assert fast(again) == greedy(again) == greedy(model)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert own.isdisjoint({p.untyped_storage().data_ptr() for p in again.parameters()})


def test_a_model_that_cannot_share_is_an_error(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="share_weights=False"):
        load(apply={"share_weights": False})
    with pytest.raises(UsageError, match="lora='merge'"):
        load(apply={"lora": "merge"})
    rlpatch.apply()
    monkeypatch.setattr(phases.Colocation, "loading", lambda self: self.refuse("no reason at all"))
    with pytest.raises(SharingError, match="no reason at all"):
        load()
    assert phases.live() == []


def test_errors_before_anything_is_loaded(load: Any, tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    with pytest.raises(UsageError, match=r"max_num_seq=.*'max_num_seqs'"):
        load(max_num_seq=3)
    with pytest.raises(UsageError, match=r"load_in_4bit=True.*GPU"):
        load(load_in_4bit=True)


def test_copies_have_no_engine(load: Any) -> None:
    model = load()
    twin = copy.deepcopy(model)
    assert {p.data_ptr() for p in twin.parameters()}.isdisjoint({p.data_ptr() for p in model.parameters()})
    assert phases.of_trainer(twin) is None
    with pytest.raises(UsageError, match="copy"):
        twin.fast_generate(["w1"])


def test_after_revert_it_is_an_ordinary_model(load: Any) -> None:
    model = load()
    before = greedy(model)
    rlpatch.revert()
    with pytest.raises(SharingError, match=r"rlpatch\.revert"):
        fast(model)
    assert greedy(model) == before and phases.of_trainer(model) is None


# ---- adapters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", ["auto", "slots"])
def test_adapters_added_after_loading(load: Any, lora: str) -> None:
    plain = load(apply={"lora": lora}, max_lora_rank=8)
    base = fast(plain)
    assert base == greedy(plain)
    model = adapted(plain)
    kept = frozen(model)
    seen = [base]
    for seed in (1, 2):
        randomize(model, seed)
        seen.append(fast(model))
        assert seen[-1] == greedy(model)
    assert seen[0] != seen[1] != seen[2], "the values made no difference: this test would not notice a lost update"
    assert fast(model, lora=False) == base and fast(model, lora_request=None) == seen[-1]
    with model.disable_adapter():
        assert fast(model) == base
    assert fast(model) == seen[-1]
    for name, parameter in model.named_parameters():
        if name in kept:
            assert torch.equal(parameter, kept[name]), name
    pair = phases.of_trainer(model)
    assert pair is not None and pair is phases.of_trainer(plain) and resident_twice(plain, pair.engine.model) == 0
    assert pair.describe()["lora"]["mode"] == ("slots" if lora == "slots" else "fold")


@pytest.mark.parametrize("lora", ["auto", "slots"])
def test_saved_and_loaded_adapters(load: Any, lora: str, tmp_path: Path, tiny_model: str) -> None:
    model = adapted(load(apply={"lora": lora}, max_lora_rank=8), target_modules=["q_proj", "up_proj"], use_rslora=True)
    mine = fast(model)
    folder = model.save_lora(tmp_path / "mine")
    again = peft.PeftModel.from_pretrained(other_trainer(tiny_model), folder).eval()
    assert greedy(again) == mine and again.peft_config["default"].base_model_name_or_path == tiny_model
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
    assert not any(config.inference_mode for config in model.peft_config.values()), "the trainer's config was changed"

    theirs = adapted(other_trainer(tiny_model), seed=7, r=6, target_modules=["v_proj", "down_proj"])
    theirs.save_pretrained(tmp_path / "theirs")
    foreign = model.load_lora(tmp_path / "theirs")
    kept = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    handle = model.load_lora(folder)
    assert (handle.name, handle.path, handle.rank, foreign.rank) == ("mine", folder, 4, 6)
    assert len(handle.tensors) == 4 and handle.config.use_rslora
    randomize(model, 3)
    active = fast(model)
    assert fast(model, lora=handle) == mine != active
    assert fast(model, lora_request=foreign) == greedy(theirs)
    with phases.of_trainer(model).rollout(), pytest.raises(UsageError, match="inside of another rollout"):
        fast(model, lora=handle)
    assert fast(model) == active == greedy(model)
    shutil.rmtree(folder)
    assert fast(model, lora=handle) == mine, "a handle keeps what was read"
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trainable
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, kept[name]), name
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("lora", ["auto", "slots"])
def test_a_loaded_adapter_on_a_model_without_any(load: Any, lora: str, tmp_path: Path, tiny_model: str) -> None:
    theirs = adapted(other_trainer(tiny_model), seed=7)
    theirs.save_pretrained(tmp_path)
    model = load(apply={"lora": lora, "standby": False}, max_lora_rank=8, enable_prefix_caching=True, block_size=32)
    long = [[(7 * i + 3) % 58 + 3 for i in range(70)]]  # more than a block, so that a stale prefix would show
    base = fast(model, long)
    handle = model.load_lora(tmp_path)
    assert fast(model, long, lora=handle) == greedy(theirs, long) != base
    phases.of_trainer(model).sync = lambda: None  # what a trainer's next rollout may do
    assert fast(model, long) == base == greedy(model, long)
    assert all(parameter.requires_grad for parameter in model.parameters()), "a skeleton's adapter froze the trainer"
    tuned = adapted(model, seed=8)
    assert fast(tuned, long) == greedy(tuned, long) and fast(tuned, long, lora=handle) == greedy(theirs, long)


def test_adapters_come_and_go(load: Any) -> None:
    plain = load()
    base = fast(plain)
    model = adapted(plain)
    assert fast(model) == greedy(model) != base
    model.add_adapter("second", peft.LoraConfig(r=3, target_modules=["o_proj"]))
    model.set_adapter("second")
    randomize(model, 5, "second")
    assert fast(model) == greedy(model)
    unloaded = model.unload()
    assert unloaded is plain and fast(plain) == base
    merged = adapted(plain, seed=6)
    expected = fast(merged)
    assert fast(merged.merge_and_unload()) == expected == greedy(plain) != base


@pytest.mark.parametrize("lora", ["auto", "slots"])
def test_modules_to_save_take_the_originals_place(load: Any, lora: str) -> None:
    plain = load(apply={"lora": lora}, max_lora_rank=8)
    pair = phases.of_trainer(plain)
    base, original = fast(plain), plain.lm_head.weight.detach().clone()
    model = adapted(plain, target_modules=["q_proj"], modules_to_save=["lm_head"])
    head = model.base_model.model.lm_head
    assert fast(model) == greedy(model)
    with torch.no_grad():
        head.modules_to_save["default"].weight.copy_(original.roll(1, 0))
    assert fast(model) == greedy(model) != base
    assert torch.equal(head.original_module.weight, original) and pair.replaced == ("lm_head.weight",)
    assert resident_twice(model, pair.engine.model) == 0
    with pytest.raises(UsageError, match=r"modules_to_save.*lm_head\.weight"):
        fast(model, lora=False)
    with model.disable_adapter():
        assert fast(model) == base == greedy(model)
    assert fast(model) == greedy(model) != base and torch.equal(head.original_module.weight, original)
    unloaded = model.unload()  # PEFT leaves the trained copy in place
    assert fast(unloaded) == greedy(plain) == fast(plain, lora=False) != base


def test_adapters_that_cannot_reach_the_engine(load: Any, tmp_path: Path) -> None:
    plain = load()
    base = fast(plain)
    model = adapted(plain, use_dora=True)
    with pytest.raises(UsageError, match="DoraLinearVariant"):
        fast(model)
    assert fast(model, lora=False) == base, "what was refused left the pair as it was"
    pair = phases.of_trainer(model)
    assert pair.shares and pair.policy is None
    model.save_lora(tmp_path)
    with pytest.raises(UsageError, match=r"cannot serve this adapter.*DoraLinearVariant"):
        model.load_lora(tmp_path)


def test_a_rank_beyond_the_slots(load: Any, tmp_path: Path, tiny_model: str) -> None:
    plain = load(apply={"lora": "slots"}, max_lora_rank=8)
    base = fast(plain)
    adapted(other_trainer(tiny_model), r=9).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"r=9 .*max_lora_rank=8"):
        plain.load_lora(tmp_path)
    model = adapted(plain, r=9)
    with pytest.raises(UsageError, match=r"r=9 .*max_lora_rank=8"):
        fast(model)
    assert fast(model, lora=False) == base
    with pytest.raises(UsageError, match="max_lora_rank"):
        load(max_lora_rank=1 << 20)


def test_adapters_of_other_models_are_refused_by_name(load: Any, tmp_path: Path, tiny_model: str) -> None:
    model = load()
    narrow = tiny.write_model(tmp_path / "narrow", hidden_size=32)
    adapted(other_trainer(str(narrow)), target_modules=["v_proj"]).save_pretrained(tmp_path / "shape")
    with pytest.raises(
        UsageError, match=r"lora_A of model\.layers\.0\.self_attn\.v_proj has shape \(4, 32\).*\(32, 64\)"
    ):
        model.load_lora(tmp_path / "shape")
    deep = tiny.write_model(tmp_path / "deep", num_hidden_layers=3)
    adapted(other_trainer(str(deep)), target_modules=["v_proj"]).save_pretrained(tmp_path / "layers")
    with pytest.raises(UsageError, match=r"model\.layers\.2\.self_attn\.v_proj, and this one has no such layer"):
        model.load_lora(tmp_path / "layers")
    good = adapted(other_trainer(tiny_model))
    good.save_pretrained(tmp_path / "good")
    assert fast(model, lora=model.load_lora(tmp_path / "good")) == greedy(good), "what was refused left traces"


def test_missing_files_and_other_mistakes(load: Any, tmp_path: Path, tiny_model: str) -> None:
    model = load()
    adapted(other_trainer(tiny_model)).save_pretrained(tmp_path / "good")
    handle = model.load_lora(tmp_path / "good")
    for missing in ("adapter_config.json", "adapter_model.safetensors"):
        folder = Path(shutil.copytree(tmp_path / "good", tmp_path / missing))
        (folder / missing).unlink()
        with pytest.raises(UsageError, match=f"the folder has no {missing}"):
            model.load_lora(folder)
    with pytest.raises(UsageError, match="there is no such folder"):
        model.load_lora(tmp_path / "nowhere")
    config = json.loads((tmp_path / "good" / "adapter_config.json").read_text())
    other = Path(shutil.copytree(tmp_path / "good", tmp_path / "kind"))
    (other / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "IA3"}))
    with pytest.raises(UsageError, match="type IA3"):
        model.load_lora(other)
    with pytest.raises(UsageError, match="has no adapters"):
        model.save_lora(tmp_path / "none")
    wrapped = adapted(model)
    with pytest.raises(UsageError, match=r"adapter='second'.*'default'"):
        wrapped.save_lora(tmp_path / "none", adapter="second")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="this is a file"):
        wrapped.save_lora(tmp_path / "file")
    with pytest.raises(UsageError, match=r"lora='/some/path'.*load_lora"):
        fast(model, lora="/some/path")
    with pytest.raises(UsageError, match="one argument"):
        fast(model, lora=False, lora_request=handle)
    second = load()
    with pytest.raises(UsageError, match="another model"):
        fast(second, lora=handle)


def test_an_exception_while_an_adapter_is_in_place(load: Any, tmp_path: Path, tiny_model: str) -> None:
    adapted(other_trainer(tiny_model), seed=7).save_pretrained(tmp_path)
    model = adapted(load())
    expected, kept = fast(model), frozen(model)
    handle = model.load_lora(tmp_path)
    with pytest.raises(Exception, match=r"max_model_len|maximum|longer|length"):
        fast(model, [[5] * 200], lora=handle)
    for name, parameter in model.named_parameters():
        assert name not in kept or torch.equal(parameter, kept[name]), name
    assert fast(model) == expected


# ---- in a trainer --------------------------------------------------------------------------------------------------


def trainer_on(monkeypatch: pytest.MonkeyPatch, model: Any, tiny_model: str, **job: Any) -> Any:
    """The demo's trainer on `model` instead of one that it loads itself."""
    from transformers import AutoModelForCausalLM

    with monkeypatch.context() as patch:
        patch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: model)
        return worker.make_trainer(worker.Job(tiny_model, True, **job))


def losses(trainer: Any) -> list[tuple[float, float]]:
    torch.manual_seed(11)  # vLLM's sampler draws from the global generator on CPU, and building engines moves it
    trainer.train()
    return [(row["loss"], row["grad_norm"]) for row in trainer.state.log_history if "loss" in row]


LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}


@pytest.mark.parametrize("lora", [None, "auto", "slots", "given"], ids=["full", "fold", "slots", "peft-model"])
def test_a_trainer_uses_this_engine(
    load: Any, tiny_model: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, lora: str | None
) -> None:
    job: dict[str, Any] = {"steps": 3, "lora": LORA if lora else {}}
    settings = {"lora": lora} if lora == "slots" else {}
    rlpatch.apply(**settings)
    ordinary = losses(worker.make_trainer(worker.Job(tiny_model, True, **job)))
    rlpatch.revert()

    built = engines_built(monkeypatch)
    model = load(apply=settings, max_lora_rank=8)
    if lora == "given":
        torch.manual_seed(0)  # as set_seed before the trainer that adds adapters by itself
        job["lora"] = {}
        given = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **LORA))
    else:
        given = model
    torch.manual_seed(0)
    with caplog.at_level(logging.INFO, logger="rlpatch"):
        trainer = trainer_on(monkeypatch, given, tiny_model, **job)
    pair = phases.of_trainer(model)
    assert len(built) == 1 and worker.engine_of(trainer) is built[0] is pair.engine.llm
    assert "vllm_gpu_memory_utilization=0.3 (it has 0.5)" in caplog.text
    inside = {name: p.data_ptr() for name, p in pair.engine.model.named_parameters()}
    base = frozen(trainer.model)
    base_tokens = fast(model, lora=False)
    measured = losses(trainer)
    assert len(measured) == 3
    if lora != "given":  # its adapters' first values come from another seed
        for mine, theirs in zip(measured, ordinary, strict=True):
            assert mine == pytest.approx(theirs, abs=1e-5)
    logs = [row for row in trainer.state.log_history if "loss" in row]
    assert max(row["sampling/sampling_logp_difference/mean"] for row in logs) < 2e-6
    assert {name: p.data_ptr() for name, p in pair.engine.model.named_parameters()} == inside
    assert resident_twice(model, pair.engine.model) == 0
    for name, parameter in trainer.model.named_parameters():
        assert name not in base or torch.equal(parameter, base[name]), name
    trainer.model.eval()
    assert fast(model) == greedy(trainer.model)
    if lora:
        assert fast(model, lora=False) == base_tokens and pair.describe()["lora"]["mode"] in ("fold", "slots")
    second = trainer_on(monkeypatch, trainer.model, tiny_model, steps=1)
    assert len(losses(second)) == 1 and len(built) == 1


def test_a_trainers_settings_that_the_engine_contradicts(
    load: Any, tiny_model: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = load(max_seq_length=64)
    with pytest.raises(UsageError, match=r"vllm_max_model_length=96 .*max_seq_length=64"):
        trainer_on(monkeypatch, model, tiny_model)
    config = {"vllm_max_model_length": 64, "vllm_enable_sleep_mode": True}
    with caplog.at_level(logging.INFO, logger="rlpatch"):
        trainer = trainer_on(monkeypatch, model, tiny_model, config=config, steps=1)
    generation = getattr(trainer, "vllm_generation", None)
    sleeps = generation.enable_sleep_mode if generation is not None else trainer.args.vllm_enable_sleep_mode
    assert "vllm_enable_sleep_mode=True" in caplog.text and not sleeps
    assert len(losses(trainer)) == 1


def test_adapters_that_only_trl_can_merge(
    load: Any, tiny_model: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """DoRA: the pair parts, with a warning, and TRL trains as it does by itself."""
    built = engines_built(monkeypatch)
    model = load()
    job: dict[str, Any] = {"steps": 2, "lora": {**LORA, "use_dora": True}}
    with caplog.at_level(logging.WARNING, logger="rlpatch"):
        trainer = trainer_on(monkeypatch, model, tiny_model, **job)
    assert "LoRA by merge" in caplog.text and "DoraLinearVariant" in caplog.text
    assert len(built) == 1
    rows = losses(trainer)
    assert len(rows) == 2
    logs = [row for row in trainer.state.log_history if "loss" in row]
    assert max(row["sampling/sampling_logp_difference/mean"] for row in logs) < 2e-6
    with pytest.raises(SharingError, match="weights of its own"):
        fast(model)


def test_names_that_are_public() -> None:
    assert "load" in rlpatch.__all__ and rlpatch.load.__doc__ and loading.load.__doc__
