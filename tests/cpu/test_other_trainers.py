"""Trainers beside GRPO and RLOO that generate with a colocated engine: plain and patched runs agree step by step."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import fields
from typing import Any

import pytest
import torch
from test_trl_sleep import known_bad, trained

import rlpatch
from rlpatch.demo import worker
from rlpatch.engine import Engine
from rlpatch.sharing.account import resident_twice

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("collected")]

JUDGED: dict[str, Any] = {
    "max_new_tokens": 16,
    "max_length": 80,
    "disable_dropout": True,
    "missing_eos_penalty": None,
}
TAUGHT: dict[str, Any] = {"max_completion_length": 16, "max_length": 96, "vllm_max_model_length": 96, "lmbda": 1.0}
GROUPED: dict[str, Any] = {"max_completion_length": 16, "vllm_max_model_length": 96, "num_generations": 4}
# kind -> (modules where it may live, prefix of its classes, what its config needs)
KINDS: dict[str, tuple[tuple[str, ...], str, dict[str, Any]]] = {
    "online_dpo": (("trl.experimental.online_dpo", "trl"), "OnlineDPO", JUDGED),
    "nash_md": (("trl.experimental.nash_md", "trl"), "NashMD", JUDGED),
    "xpo": (("trl.experimental.xpo", "trl"), "XPO", JUDGED),
    "distillation": (("trl", "trl.experimental.distillation"), "Distillation", TAUGHT),
    "gold": (("trl.experimental.gold",), "GOLD", {**TAUGHT, "dataset_kwargs": {"skip_prepare_dataset": True}}),
    "iw_opd": (("trl.experimental.iw_opd",), "IWOPD", {**TAUGHT, "max_prompt_length": 32}),
    # its default reward for success is never reached, and without a success there is no teacher
    "sdpo": (("trl.experimental.sdpo",), "SDPO", {**GROUPED, "success_reward_threshold": 0.5}),
    "sdft": (("trl.experimental.sdft",), "SDFT", {**GROUPED, "distillation_topk": 8}),
    "ssd": (("trl.experimental.ssd",), "SSD", {**GROUPED, "num_generations": 1}),
    "minillm": (("trl.experimental.minillm",), "MiniLLM", GROUPED),
    "dppo": (("trl.experimental.dppo",), "DPPO", GROUPED),
    "grpo_with_replay_buffer": (("trl.experimental.grpo_with_replay_buffer",), "GRPOWithReplayBuffer", GROUPED),
}
# They inherit Online DPO's engine and generate with transformers, for which a colocated engine leaves no configuration
ENGINELESS = ("nash_md", "xpo")
COMMON: dict[str, Any] = dict(
    use_vllm=True,
    vllm_mode="colocate",
    vllm_gpu_memory_utilization=0.3,
    per_device_train_batch_size=4,
    learning_rate=1e-3,
    lr_scheduler_type="constant",
    max_steps=3,
    logging_steps=1,
    save_strategy="no",
    report_to=[],
    seed=0,
    bf16=False,
    use_cpu=True,
    disable_tqdm=True,
    gradient_checkpointing=False,
)


def classes(kind: str) -> tuple[Any, Any]:
    """Trainer and config class, or a skip where this TRL has none that generates in colocate mode."""
    modules, prefix, _ = KINDS[kind]
    for name in modules:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        if hasattr(module, f"{prefix}Trainer"):
            config = getattr(module, f"{prefix}Config")
            if "vllm_mode" not in {field.name for field in fields(config)}:
                break
            trainer = getattr(module, f"{prefix}Trainer")
            if "generation_config.max_completion_length" in inspect.getsource(trainer):
                pytest.skip(f"this TRL's {prefix} cannot generate with vLLM: it reads a setting that it has not made")
            return trainer, config
    pytest.skip(f"this TRL has no {prefix}Trainer with a colocated engine")


def restore_what_transformers_dropped() -> None:
    """Older Online DPO reads these of ``transformers.Trainer``, where transformers 5 has them no more."""
    from transformers import Trainer

    def gathered(self: Any, tensors: Any, name: str | None = None) -> Any:
        return self.accelerator.gather(tensors)

    for name, value in (("_nested_gather", gathered), ("use_apex", False)):
        if not hasattr(Trainer, name):
            setattr(Trainer, name, value)


def score(completions: list[str], **_: Any) -> list[float]:
    return [sum(map(ord, text)) % 7 / 7 for text in completions]


def make(kind: str, path: str, output: Any, lora: bool = False, judge: Any = None, **changes: Any) -> Any:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    if judge:
        from trl import OnlineDPOConfig as config
        from trl import OnlineDPOTrainer as trainer
    else:
        trainer, config = classes(kind)
    known = {field.name for field in fields(config)}
    settings = {k: v for k, v in {**COMMON, **KINDS[kind][2], **changes}.items() if k in known}
    restore_what_transformers_dropped()
    patch_set = worker.engine_defaults(dtype="float32", enforce_eager=True, kv_cache_memory_bytes=32 << 20)
    patch_set.apply()
    try:
        set_seed(0)
        model, other = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for _ in range(2))
        texts = [" ".join(f"w{(7 * i + 3 * j) % 58}" for j in range(3 + i % 5)) for i in range(32)]
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(0.01)  # a teacher that agrees would leave nothing to learn
        offered = {
            "teacher_model": other,
            **({"judge": judge} if judge else {"reward_funcs": score}),
        }
        if lora:
            from peft import LoraConfig

            offered["peft_config"] = LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM")
        else:
            offered["ref_model"] = other
        taken = {name for base in trainer.__mro__ for name in inspect.signature(base.__init__).parameters}
        return trainer(
            model=model,
            args=config(output_dir=str(output), **settings),
            train_dataset=Dataset.from_dict(
                {"messages": [[{"role": "user", "content": t}, {"role": "assistant", "content": t}] for t in texts]}
                if kind in ("gold", "iw_opd") or trainer.__module__.startswith("trl.experimental.distillation")
                else {"prompt": texts, "privileged_context": texts[::-1]}
            ),
            processing_class=AutoTokenizer.from_pretrained(path, padding_side="left"),
            **{name: value for name, value in offered.items() if name in taken},
        )
    finally:
        patch_set.revert()


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ENGINELESS])
def test_shared_and_the_same_as_plain(kind: str, tiny_model: str, tmp_path: Any) -> None:
    classes(kind)
    rlpatch.apply(include=["cpu_weights"])
    try:
        plain = make(kind, tiny_model, tmp_path / "plain")
        expected = losses(plain)
        weights = plain.model.state_dict()
    finally:
        rlpatch.revert()
    rlpatch.apply()
    try:
        trainer = make(kind, tiny_model, tmp_path / "patched")
        engine = Engine(worker.engine_of(trainer))
        assert resident_twice(trainer.model, engine.model) == 0
        assert worker.kv_resident(engine) == 0
        assert losses(trainer) == pytest.approx(expected, abs=5e-7)
        assert worker.kv_resident(engine) == 0
        pair = rlpatch.status().pairs[-1]
        assert pair["sharing"]["shared"] > 0 and pair["sharing"]["copied"] == {} and pair["standby"]["cycles"] > 3
        for name, tensor in trainer.model.state_dict().items():
            assert torch.equal(tensor, weights[name]), name
    finally:
        rlpatch.revert()
    assert len(expected) == 3 and len(set(expected)) > 1


@pytest.mark.parametrize("kind", ["online_dpo", "sdpo"])
def test_lora(kind: str, tiny_model: str, tmp_path: Any) -> None:
    """SDPO's teacher is a second adapter, which it attaches after the engine has been paired."""
    rlpatch.apply(include=["cpu_weights"])
    try:
        plain = make(kind, tiny_model, tmp_path / "plain", lora=True, learning_rate=5e-3)
        expected = losses(plain)
    finally:
        rlpatch.revert()
    rlpatch.apply()
    try:
        trainer = make(kind, tiny_model, tmp_path / "patched", lora=True, learning_rate=5e-3)
        engine = Engine(worker.engine_of(trainer))
        frozen = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
        assert resident_twice(trainer.model, engine.model) == 0
        assert losses(trainer) == pytest.approx(expected, abs=1e-5)
        pair = rlpatch.status().pairs[-1]
        assert pair["lora"]["mode"] == "fold" and pair["standby"]["cycles"] > 3
        for name, tensor in frozen.items():
            assert torch.equal(trainer.model.get_parameter(name), tensor), name
    finally:
        rlpatch.revert()
    assert len(expected) == 3 and len(set(expected)) > 1


@pytest.mark.parametrize("kind", ENGINELESS)
def test_never_generates_with_its_engine(kind: str, tiny_model: str, tmp_path: Any) -> None:
    """Plain TRL fails in the first step; if this fails because it works now, take the kind out of ENGINELESS."""
    errors = []
    for patched in (False, True):
        rlpatch.apply(**({} if patched else {"include": ["cpu_weights"]}))
        try:
            trainer = make(kind, tiny_model, tmp_path / str(patched))
            with pytest.raises((AttributeError, TypeError, ValueError)) as error:
                trainer.train()
            errors.append(f"{error.type.__name__}: {error.value}")
        finally:
            rlpatch.revert()
    assert errors[0] == errors[1]


def test_what_cannot_be_served_runs_as_before(
    tiny_model: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Online DPO before 0.23 reaches into its engine, which vLLM keeps in another process unless told otherwise."""
    import trl

    config = getattr(trl, "OnlineDPOConfig", None)
    if config is None or "vllm_mode" in {field.name for field in fields(config)}:
        pytest.skip("this TRL's Online DPO is served")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

    class Judge(trl.BasePairwiseJudge):  # type: ignore[misc]
        def judge(self, prompts: list[str], completions: list[list[str]], shuffle_order: bool = True) -> list[int]:
            return [int(score([b])[0] > score([a])[0]) for a, b in completions]

    def run(patched: bool) -> list[float]:
        rlpatch.apply(**({} if patched else {"include": ["cpu_weights"]}))
        try:
            trainer = make("online_dpo", tiny_model, tmp_path / str(patched), judge=Judge())
            found = losses(trainer)
            assert resident_twice(trainer.model, Engine(worker.engine_of(trainer)).model) > 0
            assert not rlpatch.status().pairs
        finally:
            rlpatch.revert()
        return found

    expected = run(False)
    assert not [r for r in caplog.records if "runs as without rlpatch" in r.getMessage()]
    assert run(True) == pytest.approx(expected, abs=5e-7) and len(set(expected)) > 1
    told = [r for r in caplog.records if "runs as without rlpatch" in r.getMessage()]
    assert len(told) == 1 and "OnlineDPOTrainer" in told[0].getMessage()


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("kind", ["online_dpo", "gold"])
def test_sleeps_and_accumulates(kind: str, patched: bool, tiny_model: str, tmp_path: Any, sleepy: None) -> None:
    """Several generations in one optimizer step: plain TRL discards the weights after each and pushes once a step.

    The first that would come from other weights ends the run: an engine that is half asleep may never finish it.
    Trainers that generate through ``VLLMGeneration`` have test_trl_sleep.py.
    """
    trainer_class, config = classes(kind)
    if "vllm_enable_sleep_mode" not in {field.name for field in fields(config)}:
        pytest.skip(f"this TRL's {trainer_class.__name__} has no sleep mode")
    if not hasattr(trainer_class, "_move_model_to_vllm"):
        pytest.skip(f"this TRL's {trainer_class.__name__} sleeps as GRPO does")
    rlpatch.apply(**({"share_weights": False, "standby": False} if patched else {"include": ["cpu_weights"]}))
    try:
        trainer = make(kind, tiny_model, tmp_path, vllm_enable_sleep_mode=True, gradient_accumulation_steps=2)
        seen = trained(trainer, limit=1e-4)
    finally:
        rlpatch.revert()
    if patched:
        assert len(seen) >= 6 and max(seen) == 0
    else:
        told = {"online_dpo": "trl-online-dpo-skipped-sync", "gold": "trl-gold-generates-asleep"}[kind]
        assert (max(seen) > 1e-4) == known_bad(told), seen
