"""Scripts that give TRL a path and ``bf16=True``: float32 weights and a bfloat16 engine, made one copy."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import rlpatch
from rlpatch import doctor
from rlpatch.errors import UsageError

pytestmark = [pytest.mark.cpu, pytest.mark.timeout(300)]

NOISE = 3e-2  # of metrics after the first step: bfloat16 rollouts and matrices, other roundings of norms


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """``checkpoints(family, dtype)`` -> folder."""
    from rlpatch.demo import tiny

    made: dict[tuple[str, str], str] = {}

    def folder(family: str = "llama", dtype: str = "bfloat16") -> str:
        if (family, dtype) not in made:
            made[family, dtype] = str(tiny.write_model(tmp_path_factory.mktemp("model"), family, dtype=dtype))
        return made[family, dtype]

    return folder


@pytest.fixture
def build(checkpoints: Callable[..., str]) -> Iterator[Callable[..., tuple[Any, Any]]]:
    """``build(apply=…, config=…, …)`` -> a trainer and its job; plain TRL with ``apply=None``."""
    from rlpatch.demo import worker

    def make(apply: dict[str, Any] | None = None, plain: bool = False, **changes: Any) -> tuple[Any, Any]:
        rlpatch.revert()
        rlpatch.apply(**({"include": ["cpu_weights"]} if plain else apply or {}))
        changes["config"] = {"bf16": True, **changes.get("config", {})}
        job = worker.Job(
            changes.pop("model", None) or checkpoints(),
            not plain,
            **{"dtype": "bfloat16", "from_path": True, "steps": 3, **changes},
        )
        return worker.make_trainer(job), job

    yield make
    rlpatch.revert()
    gc.collect()


def train(built: tuple[Any, Any], **arguments: Any) -> dict[str, Any]:
    from rlpatch.demo import worker

    return worker.train(*built, **arguments)


@pytest.mark.parametrize(
    ("how", "expected"),
    [({}, "float32"), ({"lora": {"r": 4}}, "float32"), ({"apply": {"precision": "as-is"}}, None)],
)
def test_the_memory_plan_knows_how_wide_the_residual_stream_is(
    build: Callable[..., tuple[Any, Any]], how: dict[str, Any], expected: str | None
) -> None:
    from rlpatch.adapters.trl.memory_plan_v0_18 import budget
    from rlpatch.memory import describe

    trainer, _ = build(**how)
    found = budget(trainer.vllm_generation)
    assert found.residual == expected and found.masters is (expected is not None)
    _, training, _ = describe(trainer, residual=found.residual)
    assert training.residual == expected
    embedded = trainer.model.get_input_embeddings()
    with torch.autocast("cpu", torch.bfloat16):
        stream = embedded(torch.zeros(1, 1, dtype=torch.long)).dtype
    assert stream == torch.float32  # of float32 weights anyway
    assert (embedded.weight.dtype == torch.float32) is (expected is None)


def masters_of(trainer: Any) -> dict[str, torch.Tensor]:
    """name -> what the optimizer steps."""
    from rlpatch.precision import model

    prepared = model.of(trainer.model)
    assert prepared is not None
    return {n: prepared.masters.master_of(p, p).detach() for n, p in trainer.model.named_parameters()}


def agree(plain: dict[str, Any], ours: dict[str, Any], *, first: float) -> None:
    """The same before anything was trained, to within `first` (relative); within bfloat16's noise afterwards."""
    assert len(plain["steps"]) == len(ours["steps"])
    for step, (a, b) in enumerate(zip(plain["steps"], ours["steps"], strict=True), 1):
        for metric in ("loss", "grad_norm", "reward"):
            within = {"rel": first, "abs": 1e-6} if step == 1 else {"rel": NOISE, "abs": NOISE}
            expected = pytest.approx(a[metric], **within)
            assert b[metric] == expected, f"step {step}: {metric}"
        assert b["logp_difference"] < 2 * max(row["logp_difference"] for row in plain["steps"])


def test_lora_over_a_path(build: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "rlpatch")
    lora = {"r": 4, "lora_alpha": 8}
    plain = build(plain=True, lora=lora, steps=4)
    sizes = {}

    def frozen_bytes(trainer: Any) -> int:
        return sum(p.numel() * p.element_size() for p in trainer.model.parameters() if not p.requires_grad)

    sizes["plain"] = frozen_bytes(plain[0])
    expected = train(plain)
    ours = build(lora=lora, steps=4)
    sizes["ours"] = frozen_bytes(ours[0])
    trained = [p for p in ours[0].model.parameters() if p.requires_grad]
    assert trained and all(p.dtype == torch.float32 for p in trained)
    result = train(ours)
    assert sizes["plain"] == 2 * sizes["ours"]
    assert expected["weights_twice_bytes"] > 0 and result["weights_twice_bytes"] == 0
    pair = result["status"]["pairs"][-1]
    assert pair["sharing"]["copied"] == {} and pair["lora"]["mode"] == "fold"
    # Llama's base is rounded by autocast wherever it meets the adapters: the same bits.
    agree(expected, result, first=1e-6)
    assert result["status"]["precision"][-1]["mode"] == "base"
    told = [finding for finding in doctor.diagnose().findings if finding.title.startswith("precision of ")]
    assert [finding.title.endswith(": base") for finding in told] == [True]
    assert "2 bytes per frozen parameter" in told[0].detail
    assert "precision base: the frozen base keeps the checkpoint's bfloat16" in caplog.text


@pytest.mark.parametrize("family", ["llama", "qwen3-tied"])
def test_full_fine_tuning_over_a_path(build: Callable[..., Any], checkpoints: Callable[..., str], family: str) -> None:
    changes = {"model": checkpoints(family), "config": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.2}}
    expected = train(build(plain=True, **changes))
    ours = build(**changes)
    trainer = ours[0]
    resident: list[dict[str, Any]] = []
    reward = trainer.reward_funcs[0]

    def watched(*args: Any, **kwargs: Any) -> Any:
        resident.append(rlpatch.status().precision[-1])
        return reward(*args, **kwargs)

    trainer.reward_funcs[0] = watched
    trainer.reward_func_names = ["reward_target_words"]
    result = train(ours)
    # Qwen's q_norm gives bfloat16 where it gave float32; Llama has no norm over what autocast has rounded.
    agree(expected, result, first={"llama": 1e-4, "qwen3-tied": 6e-2}[family])
    assert result["weights_twice_bytes"] == 0
    assert result["status"]["pairs"][-1]["sharing"]["copied"] == {}
    now = resident[-1]  # while the rollouts are scored, after steps were taken
    count = sum(p.numel() for p in trainer.model.parameters())
    assert now["mode"] == "masters" and now["parameters"] == count
    assert (now["weight_bytes"], now["master_bytes"], now["gradient_bytes"]) == (2 * count, 4 * count, 0)
    assert now["optimizer_bytes"] == pytest.approx(8 * count, rel=0.01)
    for name, parameter in trainer.model.named_parameters():
        master = masters_of(trainer)[name]
        assert parameter.dtype == torch.bfloat16 and master.dtype == torch.float32
        assert torch.equal(parameter, master.bfloat16())
    assert any(not torch.equal(m, m.bfloat16().float()) for m in masters_of(trainer).values())


LONGER = {
    "save_strategy": "steps",
    "save_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "per_device_eval_batch_size": 8,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "linear",
    "weight_decay": 0.01,
}


def longer(build: Callable[..., Any], folder: Path, **changes: Any) -> tuple[Any, Any]:
    """Rollouts of each step depend on step and weights alone, so that a resumed run can be compared bit by bit."""
    from transformers import TrainerCallback

    class Seed(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            torch.manual_seed(1000 + state.global_step)  # vLLM's sampler draws from it on a CPU

    built = build(steps=4, config={**LONGER, "output_dir": str(folder), **changes.pop("config", {})}, **changes)
    built[0].add_callback(Seed())
    return built


def optimizer_tensors(trainer: Any) -> list[torch.Tensor]:
    states = trainer.optimizer.state_dict()["state"]
    return [value for _, state in sorted(states.items()) for value in state.values() if torch.is_tensor(value)]


def test_resume_continues_bit_by_bit(build: Callable[..., Any], tmp_path: Path) -> None:
    straight = longer(build, tmp_path / "straight")
    train(straight)
    expected, state = ({n: m.clone() for n, m in masters_of(straight[0]).items()}, optimizer_tensors(straight[0]))
    resumed = longer(build, tmp_path / "resumed")
    train(resumed, resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    assert resumed[0].state.global_step == 4
    found = masters_of(resumed[0])
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert any(not torch.equal(m, m.bfloat16().float()) for m in expected.values())
    for a, b in zip(state, optimizer_tensors(resumed[0]), strict=True):
        assert torch.equal(a, b)


def test_steps_in_pieces_give_the_same_bits(
    build: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One backward pass a step: gradients are widened some at a time, or all before the step; clipped either way."""
    from rlpatch.precision import masters

    once = {"gradient_accumulation_steps": 1, "max_grad_norm": 0.2}
    stepper, calls = masters._stepper, []

    def counted(optimizer: Any) -> Any:
        inner = stepper(optimizer)
        assert inner is not None  # the Trainer's optimizer is one of those

        def step(one: Any) -> Any:
            calls.append(sum(p.grad is not None for group in one.param_groups for p in group["params"]))
            return inner(one)

        return step

    monkeypatch.setattr(masters, "_stepper", counted)
    monkeypatch.setattr(masters, "PIECE", 4096)
    pieces = longer(build, tmp_path / "pieces", config=once)
    result = train(pieces)
    found, state = {n: m.clone() for n, m in masters_of(pieces[0]).items()}, optimizer_tensors(pieces[0])
    assert len(calls) >= 4 * 5 and max(calls) < len(found) // 2
    monkeypatch.setattr(masters, "_stepper", lambda optimizer: None)
    whole = longer(build, tmp_path / "whole", config=once)
    expected = train(whole)
    assert [row["grad_norm"] for row in result["steps"]] == [row["grad_norm"] for row in expected["steps"]]
    assert max(row["grad_norm"] for row in result["steps"]) > 0.2  # clipped
    assert all(torch.equal(found[name], master) for name, master in masters_of(whole[0]).items())
    assert all(torch.equal(a, b) for a, b in zip(state, optimizer_tensors(whole[0]), strict=True))


def test_checkpoints_go_to_plain_trl_and_back(build: Callable[..., Any], tmp_path: Path) -> None:
    """What plain TRL writes resumes under masters and the reverse, without the loss of a bit; both load anywhere."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    train(longer(build, tmp_path / "plain", plain=True))
    ours = longer(build, tmp_path / "ours")
    train(ours)
    files = {kind: tmp_path / kind / "checkpoint-2" for kind in ("plain", "ours")}
    tensors = {kind: load_file(file / "model.safetensors") for kind, file in files.items()}
    assert {n: (t.dtype, t.shape) for n, t in tensors["plain"].items()} == {
        n: (t.dtype, t.shape) for n, t in tensors["ours"].items()
    }
    assert sorted(p.name for p in files["plain"].iterdir()) == sorted(p.name for p in files["ours"].iterdir())
    loaded = AutoModelForCausalLM.from_pretrained(files["ours"], dtype=torch.float32)
    assert all(torch.equal(p, tensors["ours"][n]) for n, p in loaded.named_parameters())

    seen: dict[str, Any] = {}

    def at_first_step(trainer: Any, kind: str) -> None:
        from transformers import TrainerCallback

        class Look(TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                plain = kind == "to plain"
                weights = dict(trainer.model.named_parameters()) if plain else masters_of(trainer)
                seen.setdefault(kind, ({n: w.detach().clone() for n, w in weights.items()}, [
                    t.clone() for t in optimizer_tensors(trainer)
                ]))  # fmt: skip

        trainer.add_callback(Look())

    for kind, source, plain in (("to masters", "plain", False), ("to plain", "ours", True)):
        built = longer(build, tmp_path / kind, plain=plain)
        at_first_step(built[0], kind)
        train(built, resume_from_checkpoint=str(files[source]))
        assert built[0].state.global_step == 4
        weights, state = seen[kind]
        assert all(torch.equal(weights[name], tensors[source][name]) for name in weights)
        written = torch.load(files[source] / "optimizer.pt", weights_only=True)["state"]
        expected = [v for _, values in sorted(written.items()) for v in values.values() if torch.is_tensor(v)]
        assert all(torch.equal(a, b) for a, b in zip(state, expected, strict=True))


def test_a_float32_checkpoint_keeps_its_values(
    build: Callable[..., Any], checkpoints: Callable[..., str], tmp_path: Path
) -> None:
    """Its low bits become the masters' at once; with only the model saved, and a reference model beside the policy."""
    from safetensors.torch import load_file

    folder = checkpoints("llama", "float32")
    config = {
        "beta": 0.1,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_only_model": True,
        "output_dir": str(tmp_path),
    }
    ours = build(model=folder, steps=1, config=config)
    stored = load_file(Path(folder) / "model.safetensors")
    assert all(torch.equal(master, stored[name]) for name, master in masters_of(ours[0]).items())
    assert all(p.dtype == torch.bfloat16 for p in ours[0].model.parameters())
    assert all(p.dtype == torch.float32 for p in ours[0].ref_model.parameters())
    train(ours)
    saved = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    assert all(torch.equal(master, saved[name]) for name, master in masters_of(ours[0]).items())
    assert not (tmp_path / "checkpoint-1" / "optimizer.pt").exists()


def test_a_reference_model_has_the_policys_precision(build: Callable[..., Any]) -> None:
    config = {"beta": 0.1}
    expected = train(build(plain=True, steps=2, config=config))
    ours = build(steps=2, config=config)
    assert all(p.dtype == torch.bfloat16 for p in ours[0].ref_model.parameters())
    agree(expected, train(ours), first=1e-4)


def test_rloo_likewise(build: Callable[..., Any]) -> None:
    ours = build(steps=2, trainer="rloo", config={"beta": 0.05})
    assert all(p.dtype == torch.bfloat16 for p in (*ours[0].model.parameters(), *ours[0].ref_model.parameters()))
    result = train(ours)
    assert result["status"]["precision"][-1]["mode"] == "masters" and result["weights_twice_bytes"] == 0


def test_what_the_script_chose_stays(build: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    given = build(steps=1, config={"model_init_kwargs": {"dtype": "float32"}})
    assert {p.dtype for p in given[0].model.parameters()} == {torch.float32}
    assert rlpatch.status().precision[-1]["reason"] == "dtype='float32' was given in model_init_kwargs"
    caplog.clear()
    wide = build(steps=1, dtype="float32", from_path=False, engine={"dtype": "bfloat16"})
    assert {p.dtype for p in wide[0].model.parameters()} == {torch.float32}
    lines = [r for r in caplog.records if "precision='masters' converts it to bfloat16" in r.getMessage()]
    assert len(lines) == 1 and lines[0].levelno == logging.WARNING
    assert rlpatch.status().pairs[-1]["sharing"] is None
    half = build(steps=2, from_path=False)
    described = train(half)["status"]["precision"][-1]
    assert described["mode"] == "as-is" and "master_bytes" not in described
    assert {p.dtype for group in half[0].optimizer.param_groups for p in group["params"]} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_masters_by_name_convert_an_object(build: Callable[..., Any], dtype: str) -> None:
    ours = build({"precision": "masters"}, steps=2, dtype=dtype, from_path=False, engine={"dtype": "bfloat16"})
    result = train(ours)
    assert result["weights_twice_bytes"] == 0
    assert result["status"]["pairs"][-1]["sharing"]["copied"] == {}
    assert result["status"]["precision"][-1]["mode"] == "masters"
    assert any(not torch.equal(m, m.bfloat16().float()) for m in masters_of(ours[0]).values())


def test_trained_copies_of_modules_get_masters(build: Callable[..., Any]) -> None:
    """modules_to_save beside a LoRA are copies of the base, hence bfloat16: they are stepped through masters, too."""
    ours = build(steps=2, lora={"r": 4, "modules_to_save": ["lm_head"], "target_modules": ["q_proj"]})
    result = train(ours)
    copies = {n: m for n, m in masters_of(ours[0]).items() if "modules_to_save" in n}
    assert copies and all(m.dtype == torch.float32 for m in copies.values())
    described = result["status"]["precision"][-1]
    assert described["parameters"] == sum(m.numel() for m in copies.values())


@pytest.mark.parametrize(
    ("config", "named"),
    [({"bf16": False}, "bf16=False"), ({"optim": "galore_adamw_layerwise"}, "optim='galore_adamw_layerwise'")],
)
def test_masters_that_cannot_be_are_an_error(build: Callable[..., Any], config: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        build({"precision": "masters"}, config=config)


def test_reverted_training_goes_on_as_plain_trl(build: Callable[..., Any]) -> None:
    ours = build(steps=2)
    trainer = ours[0]
    train(ours)
    exact = {name: master.clone() for name, master in masters_of(trainer).items()}
    rlpatch.revert()
    rlpatch.apply(include=["cpu_weights"])
    for name, parameter in trainer.model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, exact[name])
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in trainer.model.parameters()}
    trainer.args.max_steps = 4
    trainer.train()
    assert any(not torch.equal(p, exact[n]) for n, p in trainer.model.named_parameters())
