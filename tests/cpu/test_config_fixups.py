"""The config fix-ups on real TRL: configs as scripts make them, and one trainer with a LoRA."""

from __future__ import annotations

import copy
import dataclasses
import logging
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trl
from transformers import HfArgumentParser
from trl import GRPOConfig, RLOOConfig

import rlpatch
from rlpatch.errors import UsageError
from rlpatch.registry import State

pytestmark = pytest.mark.cpu

BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_generations")


@dataclasses.dataclass
class Before(GRPOConfig):
    """A user's config, made before rlpatch.apply()."""

    num_generations: int = 4
    extra: int = 1


@pytest.fixture
def applied() -> Iterator[rlpatch.control.Report]:
    yield rlpatch.apply(defaults=True, include=["defaults", "batch_check"])
    rlpatch.revert()


@pytest.fixture
def out(tmp_path: Path) -> dict[str, Any]:
    return {"output_dir": str(tmp_path), "use_cpu": True, "report_to": []}


def batch(config: Any) -> tuple[int, ...]:
    return tuple(getattr(config, name) for name in BATCH)


def test_better_defaults_once_listed(applied: Any, out: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    assert applied["defaults"].state is State.APPLIED and applied["batch_check"].state is State.NATIVE
    with caplog.at_level(logging.WARNING, "rlpatch"):
        config = GRPOConfig(**out)
    assert batch(config) == (4, 2, 8) and config.generation_batch_size == 8 and config.vllm_mode == "colocate"
    assert config.optim == "adamw_torch_fused"  # on a CPU, bitsandbytes or not
    assert config.torch_empty_cache_steps == 250 and config.learning_rate == 1e-6
    said = [record for record in caplog.records if record.name.startswith("rlpatch")]  # vLLM may warn, too
    assert len(said) == 1 and "per_device_train_batch_size  8 → 4" in caplog.text
    (entry,) = rlpatch.status().configs
    assert entry.config == "GRPOConfig" and "GRPOConfig: " in str(rlpatch.status())
    assert rlpatch.status().as_dict()["configs"][0]["changes"][0]["why"]
    assert batch(RLOOConfig(**out)) == (4, 2, 8)


def test_what_is_given_stays(applied: Any, out: dict[str, Any]) -> None:
    config = GRPOConfig(
        out["output_dir"],
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        num_generations=8,
        optim="adamw_torch",
        torch_empty_cache_steps=None,
        use_cpu=True,
        report_to=[],
    )
    assert batch(config) == (8, 1, 8) and config.optim == "adamw_torch" and config.torch_empty_cache_steps is None
    assert rlpatch.status().configs == ()


def test_what_trl_refuses_is_solved(out: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    settings = dict(per_device_train_batch_size=1, gradient_accumulation_steps=1, num_generations=6, **out)
    with pytest.raises(ValueError, match="divisible"):
        GRPOConfig(**settings)
    with rlpatch.patched(defaults=["divisibility"], include=["defaults"]):
        config = GRPOConfig(**settings, eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=4)
        assert batch(config) == (1, 6, 6) and config.num_generations_eval == 4
        assert "1 completions per optimizer step" in rlpatch.status().configs[0].batch
        monkeypatch.setattr("torch.distributed.is_initialized", lambda: False)  # engines of other tests did it
        monkeypatch.setenv("LOCAL_RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "4")
        from rlpatch.adapters.trl import config_v0_18

        assert config_v0_18._world_size(config) == 4
    monkeypatch.undo()
    with pytest.raises(ValueError, match="divisible"):
        GRPOConfig(**settings)  # reverted


def test_a_group_of_one_is_explained(applied: Any, out: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="standard deviation of one sample is undefined") as caught:
        GRPOConfig(num_generations=1, **out)
    assert "at least 2 generations" in str(caught.value.__cause__)


def test_subclasses(out: dict[str, Any]) -> None:
    with rlpatch.patched(defaults=True, include=["defaults"]):

        @dataclasses.dataclass
        class Mine(GRPOConfig):
            gradient_accumulation_steps: int = 4

        class Handmade(RLOOConfig):
            def __init__(self, **others: Any) -> None:
                super().__init__(num_generations=2, **others)

        assert batch(Mine(**out)) == (4, 4, 8)
        assert batch(Mine(**out, per_device_train_batch_size=8)) == (8, 4, 8)
        assert batch(Handmade(**out)) == (4, 2, 2)
        # its __init__ was made before anybody could look: nothing counts as left alone
        assert batch(Before(**out)) == (8, 1, 4)
        assert batch(Before(**out, num_generations=6, per_device_train_batch_size=1)) == (1, 6, 6)
    assert batch(Mine(**out)) == (8, 4, 8)


def test_copies_are_not_changed_again(applied: Any, out: dict[str, Any]) -> None:
    config = GRPOConfig(per_device_train_batch_size=8, **out)
    config.gradient_accumulation_steps = 1
    before = len(rlpatch.status().configs)
    for again in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert batch(again) == (8, 1, 8)
    assert not [name for name in vars(config) if "rlpatch" in name] and b"rlpatch" not in pickle.dumps(config)
    # steps_per_generation is derived, and TRL refuses to be given both
    again = dataclasses.replace(config, num_generations=8, generation_batch_size=None, steps_per_generation=None)
    assert batch(again) == (8, 1, 8) and len(rlpatch.status().configs) == before


def test_parsers(applied: Any, out: dict[str, Any], tmp_path: Path) -> None:
    line = ["--output_dir", out["output_dir"], "--use_cpu", "--report_to", "none"]
    (config,) = HfArgumentParser(GRPOConfig).parse_args_into_dataclasses(line)
    assert batch(config) == (4, 2, 8)
    (config,) = HfArgumentParser(GRPOConfig).parse_args_into_dataclasses([*line, "--per_device_train_batch_size", "8"])
    assert batch(config) == (8, 2, 8)
    (config,) = HfArgumentParser(GRPOConfig).parse_dict({**out, "gradient_accumulation_steps": 1})
    assert batch(config) == (8, 1, 8)
    file = tmp_path / "config.yaml"
    file.write_text("per_device_train_batch_size: 8\noptim: adamw_torch\n")
    (config,) = trl.TrlParser(GRPOConfig).parse_args_and_config([*line, "--config", str(file)])
    assert batch(config) == (8, 2, 8) and config.optim == "adamw_torch"


def test_switched_off_and_reverted(out: dict[str, Any]) -> None:
    originals = [
        (kind, name, vars(kind)[name]) for kind in (GRPOConfig, RLOOConfig) for name in ("__init__", "__post_init__")
    ]
    plain = batch(GRPOConfig(**out))
    with rlpatch.patched(defaults=False, include=["defaults"]) as report:
        assert report["defaults"].state is State.SKIPPED
        assert batch(GRPOConfig(**out)) == plain
    with rlpatch.patched(defaults=True, include=["defaults"]):
        assert batch(GRPOConfig(**out)) != plain
    assert batch(GRPOConfig(**out)) == plain and rlpatch.status().configs == ()
    assert all(vars(kind)[name] is original for kind, name, original in originals)
    assert "__init_subclass__" not in vars(GRPOConfig)


def test_trl_is_imported_no_earlier() -> None:
    code = (
        "import sys, rlpatch; rlpatch.apply(include=['defaults', 'batch_check'], defaults=True); import trl; "
        "assert 'transformers' not in sys.modules, 'import trl has become heavy'; "
        "print(rlpatch.status()['defaults'].state)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith("applied"), done.stderr


@pytest.mark.parametrize("lora", [True, False])
def test_a_lora_learns_faster(lora: bool, tiny_model: str, out: dict[str, Any]) -> None:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOTrainer

    from rlpatch.demo import worker

    with rlpatch.patched(defaults=True, include=["defaults"]):
        config = GRPOConfig(max_steps=1, max_completion_length=4, bf16=False, save_strategy="no", **out)
        trainer = GRPOTrainer(
            model=tiny_model,
            args=config,
            reward_funcs=worker.reward_target_words,
            train_dataset=Dataset.from_dict({"prompt": ["w1 w2 w3"] * 16}),
            peft_config=LoraConfig(r=4, target_modules=["q_proj"]) if lora else None,
        )
        assert trainer.args.learning_rate == (5e-5 if lora else 1e-6)
        listed = [c for entry in rlpatch.status().configs for c in entry.changes if c.field == "learning_rate"]
        assert [(c.old, c.new) for c in listed] == ([(1e-6, 5e-5)] if lora else [])
        trainer.train()
        assert trainer.optimizer.param_groups[0]["initial_lr"] == trainer.args.learning_rate
        assert trainer.state.global_step == 1
