"""Arguments of `rlpatch.load` that are refused before torch, transformers or vLLM are needed."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import rlpatch
from rlpatch import loading
from rlpatch.errors import UsageError
from rlpatch.registry import Context


def requested(**arguments: Any) -> loading.Request:
    return loading._requested("some/model", **{"max_seq_length": 64, **arguments})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_seq_length": 0}, r"max_seq_length=0.*positive whole number"),
        ({"max_seq_length": 64.0}, r"max_seq_length=64\.0"),
        ({"max_seq_length": True}, r"max_seq_length=True"),
        ({"max_lora_rank": -1}, r"max_lora_rank=-1"),
        ({"load_in_4bit": "yes"}, r"load_in_4bit='yes'.*True or False"),
        ({"gpu_memory_utilization": 0}, r"gpu_memory_utilization=0.*between 0 and 1"),
        ({"gpu_memory_utilization": 40}, r"gpu_memory_utilization=40"),
        ({"dtype": "int8"}, r"dtype='int8'.*'bfloat16'"),
        ({"tensor_parallel_size": 2}, r"tensor_parallel_size=2.*one process per device"),
        ({"fast_inference": True}, r"fast_inference=True.*always attaches"),
        ({"full_finetuning": True}, r"full_finetuning=True.*get_peft_model"),
        ({"load_in_8bit": True}, r"load_in_8bit=True.*load_in_4bit"),
        ({"max_model_len": 64}, r"max_model_len=64.*max_seq_length="),
        ({"enable_lora": True}, r"enable_lora=True.*max_lora_rank"),
        ({"enable_sleep_mode": True}, r"enable_sleep_mode=True.*standby"),
        ({"model_arguments": {"dtype": "bfloat16"}}, r"model_arguments=.*'dtype'.*load\(dtype=…\)"),
        ({"model_arguments": {"device_map": "auto"}}, r"'device_map'.*leave it out"),
        ({"model_arguments": {"quantization_config": None}}, r"'quantization_config'.*load_in_4bit"),
    ],
)
def test_unusable_arguments_are_named_with_a_remedy(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        requested(**arguments)


@pytest.mark.parametrize("model", [None, 3, "", object()])
def test_a_model_is_a_path(model: Any) -> None:
    with pytest.raises(UsageError, match="expected a folder or a hub id"):
        rlpatch.load(model, max_seq_length=64)


def test_a_path_object_will_do(tmp_path: Path) -> None:
    assert loading._requested(tmp_path, max_seq_length=1).model == str(tmp_path)


def test_max_seq_length_has_to_be_said() -> None:
    with pytest.raises(TypeError, match="max_seq_length"):
        rlpatch.load("some/model")  # type: ignore[call-arg]


def test_what_is_not_said() -> None:
    request = requested()
    assert (request.gpu_memory_utilization, request.dtype, request.max_lora_rank) == (0.5, None, 64)
    assert not request.load_in_4bit and not request.engine and not request.model_arguments


@pytest.mark.parametrize(
    ("dtype", "name"),
    [("bf16", "bfloat16"), ("torch.float16", "float16"), ("half", "float16"), ("float", "float32"), ("auto", None)],
)
def test_names_of_dtypes(dtype: str, name: str | None) -> None:
    assert requested(dtype=dtype).dtype == name


def test_other_arguments_go_to_the_engine() -> None:
    assert requested(max_num_seqs=8, kv_cache_dtype="fp8").engine == {"max_num_seqs": 8, "kv_cache_dtype": "fp8"}


@pytest.mark.parametrize(
    ("settings", "arguments", "words"),
    [
        ({"share_weights": False}, {}, "share_weights=False"),
        ({"lora": "merge"}, {}, "lora='merge'.*'slots'"),
        ({"lora": "fold"}, {"load_in_4bit": True}, "lora='fold'.*lose the adapter"),
    ],
)
def test_settings_that_load_contradicts(settings: dict[str, Any], arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        loading._check_context(Context(**settings), requested(**arguments))
    loading._check_context(Context(lora="slots"), requested(load_in_4bit=True))


def test_every_argument_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """`rlpatch.load` names its arguments for the reader; none may be lost on the way."""
    import inspect

    seen: dict[str, Any] = {}
    monkeypatch.setattr(loading, "load", lambda model, **arguments: seen.update(arguments))
    named = [p.name for p in inspect.signature(rlpatch.load).parameters.values() if p.kind is p.KEYWORD_ONLY]
    given = {name: object() for name in [*named, "max_num_seqs"]}
    rlpatch.load("some/model", **given)
    assert seen == given
    checked = inspect.signature(loading._requested).parameters
    assert named == [name for name, p in checked.items() if p.kind is p.KEYWORD_ONLY]
    defaults = inspect.signature(rlpatch.load).parameters
    assert all(checked[name].default == defaults[name].default for name in named)


def test_importing_rlpatch_and_its_loader_imports_nothing_heavy() -> None:
    script = (
        "import sys, rlpatch, rlpatch.loading; rlpatch.load; "
        "print({'torch', 'transformers', 'vllm', 'trl', 'peft'} & set(sys.modules))"
    )
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "set()"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda method: pickle.loads(pickle.dumps(method))])
def test_a_copied_model_has_no_engine(copied: Any) -> None:
    def fast_generate(prompts: Any) -> Any:
        """Generates."""
        return prompts

    method = loading.Method(fast_generate)
    assert method("a") == "a" and method.__doc__ == "Generates."
    assert copy.copy([method])[0] is method
    with pytest.raises(UsageError, match=r"model\.fast_generate .* copy"):
        copied(method)("a")
