"""The memory plan at work: real trainers, whose engines get the KV cache that the plan leaves for them.

A CPU has no memory of its own to plan with, so a size is given to it: ``apply(memory_plan="1400MiB")``.
"""

from __future__ import annotations

import logging
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, HfArgumentParser

import rlpatch
from rlpatch import doctor, phases
from rlpatch.blocks import BlockLimit
from rlpatch.demo import tiny, worker
from rlpatch.errors import UsageError

pytestmark = [pytest.mark.cpu, pytest.mark.timeout(600)]

SIZE = 1400 << 20
SETTING = "vllm_gpu_memory_utilization"

Build = Callable[..., Any]


@pytest.fixture
def build(tiny_model: str, tmp_path: Path) -> Iterator[Build]:
    """``build(plan, …)``: a trainer made as a script makes it; ``engine`` fills in arguments of ``vllm.LLM``."""

    def make(
        plan: Any = SIZE, config: Any = None, model: Any = None, engine: dict[str, Any] | None = None, **fields: Any
    ) -> Any:
        rlpatch.apply(memory_plan=plan)
        patches = worker.engine_defaults(**{"dtype": "float32", "enforce_eager": True, **(engine or {})})
        patches.apply()
        try:
            return trl.GRPOTrainer(
                model=model or AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32),
                args=config or trl.GRPOConfig(**arguments(tmp_path, **fields)),
                reward_funcs=worker.reward_target_words,
                train_dataset=Dataset.from_dict({"prompt": ["w1 w2 w3"] * 8}),
            )
        finally:
            patches.revert()

    yield make
    rlpatch.revert()


def arguments(folder: Path, **fields: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": 96,
        "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 16, "max_steps": 1,
        "save_strategy": "no", "report_to": [], "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
        "learning_rate": 1e-3, "disable_tqdm": True, "logging_steps": 1, **fields,
    }  # fmt: skip


def cache_of(trainer: Any) -> Any:
    return worker.engine_of(trainer).llm_engine.vllm_config.cache_config


def planned() -> dict[str, Any]:
    (pair,) = rlpatch.status().pairs
    made: dict[str, Any] = pair["memory_plan"]
    return made


def test_the_engine_has_the_plan_s_cache(build: Build, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "rlpatch"):
        trainer = build()
    made, cache = planned(), cache_of(trainer)
    assert made["applied"] and made["reason"] == f"{SETTING} was left alone"
    assert cache.kv_cache_memory_bytes == made["kv_cache_memory_bytes"]
    # 4 sequences of 96 tokens, rounded up to 256, which whole blocks of vLLM's choice fill, and its placeholder
    assert made["kv_sized_by"] == "all that rollouts can fill" and cache.num_gpu_blocks * cache.block_size == 5 * 256
    assert 0 <= SIZE - made["generating"] - made["kv_left_bytes"] < 64 << 10
    engine = phases.live()[0].engine
    assert engine is not None
    with phases.live()[0].rollout():
        resident = sum(tensor.untyped_storage().nbytes() for tensor in engine.kv_tensors())
    assert 0.9 * made["kv_cache_memory_bytes"] < resident <= made["kv_cache_memory_bytes"]
    assert sum(term["bytes"] for term in made["terms"] if term["resident"] != "training") == made["generating"]
    assert "KiB of KV cache (1,280 tokens), all that rollouts can fill of the" in caplog.text
    findings = {finding.title: finding.detail for finding in doctor.diagnose().findings}
    (detail,) = (text for title, text in findings.items() if title.startswith("the memory plan sizes the KV cache"))
    assert "weights, shared" in detail and "Training:" in detail
    trainer.train()
    assert trainer.state.log_history[0]["sampling/sampling_logp_difference/mean"] < 2e-6


def rolled_out(trainer: Any, tokens: int, sequences: int, count: int | None = None) -> tuple[int, int]:
    """Sequences of `tokens` tokens at once, with `count` of the engine's blocks: (preemptions, the most that ran)."""
    from vllm import SamplingParams

    engine = phases.live()[0].engine
    assert engine is not None
    scheduler = engine.core.scheduler
    preempted, running = [0], [0]
    schedule, preempt = scheduler.schedule, scheduler._preempt_request

    def counted_schedule(*args: Any, **kwargs: Any) -> Any:
        result = schedule(*args, **kwargs)
        running[0] = max(running[0], len(scheduler.running))
        return result

    def counted_preempt(*args: Any, **kwargs: Any) -> Any:
        preempted[0] += 1
        return preempt(*args, **kwargs)

    scheduler.schedule, scheduler._preempt_request = counted_schedule, counted_preempt
    limit = BlockLimit(engine)
    limit.use(count)
    try:
        prompts = [{"prompt_token_ids": [3 + i, *range(5, 28), 9 + i]} for i in range(sequences)]
        outputs = worker.engine_of(trainer).generate(
            prompts, SamplingParams(temperature=0, max_tokens=tokens - 25, ignore_eos=True), use_tqdm=False
        )
    finally:
        limit.use(None)
        del scheduler.schedule, scheduler._preempt_request
    assert [len(output.outputs[0].token_ids) for output in outputs] == [tokens - 25] * sequences
    return preempted[0], running[0]


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_full_rollouts_fill_the_cap_and_lack_nothing(build: Build, tmp_path: Path, family: str) -> None:
    """vLLM's blocks are the planned ones; all sequences at their longest run at once, and one block less preempts."""
    length, block, sequences = 128, 32, 4
    changes: dict[str, Any] = {}
    if family == "gemma3":  # a full layer and three with a window: vLLM groups them, or takes them for alike
        kinds = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]
        changes = {"num_hidden_layers": 4, "layer_types": kinds}
    folder = tiny.write_model(tmp_path / "model", family, **changes)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    trainer = build(model=model, engine={"block_size": block}, vllm_max_model_length=length)
    made, cache = planned(), cache_of(trainer)
    assert made["kv_sized_by"] == "all that rollouts can fill" and cache.kv_cache_memory_bytes > 0
    assert rolled_out(trainer, length, 2 * sequences) == (0, sequences)  # twice as many: they come one after the other
    if family == "qwen3":
        assert cache.num_gpu_blocks == sequences * length // block + 1
        page = 2 * 2 * 1 * 32 * 4 * block  # layers × keys and values × heads × head_dim × float32 × tokens
        assert made["kv_cache_memory_bytes"] == cache.num_gpu_blocks * page
        assert rolled_out(trainer, length, sequences, cache.num_gpu_blocks - 1)[0] > 0


def test_a_small_device_gives_all_that_is_left(build: Build) -> None:
    many = {"gradient_accumulation_steps": 64, "vllm_max_model_length": 256}  # 256 sequences at once
    trainer = build(**many)
    size = planned()["generating"] + (20 << 20)
    rlpatch.revert()
    del trainer
    build(size, **many)
    made = planned()
    assert made["kv_sized_by"] == "all that is left" and made["kv_left_bytes"] == made["kv_cache_memory_bytes"]
    assert 0 <= size - made["generating"] - made["kv_cache_memory_bytes"] < 64 << 10


def test_what_does_not_fit_is_refused_before_anything_is_built(
    build: Build, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    before: dict[str, Any] = {}
    original = phases.Colocation.plan_memory

    def plan_memory(self: Any, *args: Any) -> Any:
        before.update({name: (p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()})
        return original(self, *args)

    monkeypatch.setattr(phases.Colocation, "plan_memory", plan_memory)
    others = len(phases.live())
    with pytest.raises(
        UsageError, match=r"the memory plan does not fit: training needs .* more than the 600.0 MiB"
    ) as e:
        build("600MiB", model=model)
    assert "memory_plan=False" in str(e.value) and "The largest that can be changed is" in str(e.value)
    assert len(phases.live()) == others and phases.building() is None
    for name, parameter in model.named_parameters():
        pointer, value = before[name]
        assert parameter.data_ptr() == pointer and torch.equal(parameter, value)
    build(SIZE, model=model).train()  # the very same model can be trained with a plan that fits


def memory_of_vllm() -> int:
    """What its CPU backend takes a share of: the first memory node, which may be less than the machine has."""
    node = Path("/sys/devices/system/node/node0/meminfo")
    if node.is_file():
        return next(int(line.split()[3]) << 10 for line in node.read_text().splitlines() if "MemTotal" in line)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_a_given_utilization_wins_and_a_contradiction_is_one_warning(
    build: Build, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_CI_ENV", "1")  # or the profiling of an engine without a size takes half a minute
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    share = (used + (400 << 20)) / memory_of_vllm()
    with caplog.at_level(logging.WARNING, "rlpatch"):
        trainer = build(**{SETTING: share})
    assert cache_of(trainer).kv_cache_memory_bytes is None and cache_of(trainer).gpu_memory_utilization == share
    assert planned()["reason"] == f"{SETTING}={share} was given"
    (text,) = [record.getMessage() for record in caplog.records if "memory plan" in record.getMessage()]
    assert f"gpu_memory_utilization={share:g} cannot be honoured" in text and "Leave it unset, or set it to" in text


def test_a_default_that_was_passed_is_given(build: Build, tmp_path: Path) -> None:
    """Passed by hand, assigned or named on the command line, TRL's own default is the user's."""
    default = trl.GRPOConfig.__dataclass_fields__[SETTING].default
    rlpatch.apply(memory_plan=SIZE)
    from rlpatch.adapters.trl.memory_plan_v0_18 import left_alone

    assert left_alone(trl.GRPOConfig(**arguments(tmp_path)))
    assert not left_alone(trl.GRPOConfig(**arguments(tmp_path, **{SETTING: default})))
    config = trl.GRPOConfig(**arguments(tmp_path))
    setattr(config, SETTING, 0.5)
    assert not left_alone(config)
    line = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "False"]
    for extra, alone in (([], True), ([f"--{SETTING}", str(default)], False)):
        (parsed,) = HfArgumentParser(trl.GRPOConfig).parse_args_into_dataclasses([*line, *extra])
        assert left_alone(parsed) is alone
    trainer = build(engine={"num_gpu_blocks_override": 64})
    assert planned()["reason"] == "the KV cache is sized by num_gpu_blocks_override=64"
    assert cache_of(trainer).num_gpu_blocks == 64


@pytest.mark.parametrize(
    ("apply", "why"),
    [
        ({"memory_plan": False}, "switched off"),
        ({"memory_plan": SIZE, "standby": False}, "the KV cache stays resident: standby is off"),
        ({"memory_plan": SIZE, "share_weights": False}, "the weights are not shared: share_weights is off"),
        ({}, "no device memory to plan on the CPU"),
    ],
)
def test_where_there_is_no_plan_status_says_why(
    build: Build, monkeypatch: pytest.MonkeyPatch, apply: dict[str, Any], why: str
) -> None:
    original = rlpatch.apply
    monkeypatch.setattr(rlpatch, "apply", lambda **_: original(**apply))
    trainer = build(engine={"kv_cache_memory_bytes": 16 << 20})
    assert not planned()["applied"] and why in planned()["reason"]
    assert cache_of(trainer).kv_cache_memory_bytes == 16 << 20


@pytest.mark.parametrize("waiting", [0, 1, None])
def test_forward_passes_wait_where_the_plan_has_room(build: Build, bare: None, waiting: int | None) -> None:
    """Of four micro-batches' passes the loss takes one, and as many more as fit beside training's peak, at their length."""
    if "vllm_importance_sampling_correction" not in trl.GRPOConfig.__dataclass_fields__:
        pytest.skip("this TRL scores rollouts without the trainer's log-probs")
    # planned for 4 × 144 tokens; these are shorter by far
    fields = {"gradient_accumulation_steps": 4, "vllm_max_model_length": 144, "max_completion_length": 128}
    size = 4 << 30
    if waiting is not None:
        trainer = build(size, **fields)
        made = phases.live()[0].memory.plan  # type: ignore[union-attr]
        assert made is not None and made.passes_beside() > 3
        peak = max(size for moment, size in made.moments.items() if moment != "step")
        size = made.training - made.moments[made.peak] + peak + waiting * made.waiting
        rlpatch.revert()
        del trainer
    trainer = build(size, generation_kwargs={"max_tokens": 60}, **fields)
    tokens: list[int] = []
    trainer.model.register_forward_pre_hook(
        lambda _, args, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    trainer.train()
    made = phases.live()[0].memory.plan  # type: ignore[union-attr]
    assert made is not None and planned()["passes_beside"] == made.passes_beside()
    if waiting is not None:
        assert made.passes_beside() == waiting and made.tokens > 2 * tokens[0]
    kept = 1 + min(made.passes_beside(tokens[0]), 3)
    assert kept == {0: 1, 1: 3, None: 4}[waiting]
    assert len(tokens) == 8 - kept


@pytest.mark.parametrize(
    ("setting", "size", "unexpanded"),
    [
        (True, SIZE, None),
        ("auto", SIZE, None),  # it fits only just
        ("auto", "3GiB", "the memory plan does not need them"),
        (False, SIZE, "switched off"),
    ],
)
def test_segments_expand_before_the_engine_is_built(
    build: Build, setting: Any, size: str, unexpanded: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU has no such allocator; that it is asked, and when, can be seen."""
    import vllm.entrypoints.llm  # noqa: F401 - what a CPU lacks is known when it is imported

    asked: list[bool] = []

    def expand() -> None:
        pair = phases.building()
        asked.append(not phases.live() and (pair is None or pair.engine is None))

    planned_with: list[Any] = []
    decide = phases.decide_memory

    def decided(budget: Any, *args: Any) -> Any:
        planned_with.append(budget.expanding)
        return decide(budget, *args)

    apply = rlpatch.apply

    def applied(**settings: Any) -> Any:
        report = apply(**settings, expandable_segments=setting)
        if setting:
            context = rlpatch.control.context()
            context.reasons.pop("expandable_segments")
            context.providers["expandable_segments"] = expand
        return report

    monkeypatch.setattr(rlpatch, "apply", applied)
    monkeypatch.setattr(phases, "decide_memory", decided)
    build(size)
    (pair,) = rlpatch.status().pairs
    assert planned_with == [setting]
    assert pair["no expandable segments"] == unexpanded
    assert bool(asked) is (unexpanded is None) and all(asked[:1])
