"""No single segment of the device's memory for all weights. There is no such memory here: transformers' own function would
ask a GPU for it and fails, which shows whether it was called; tests/gpu/test_plain_script_gpu.py is about the memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
if torch.cuda.is_available():
    pytest.skip("for a machine without a GPU", allow_module_level=True)

import rlpatch  # noqa: E402
from rlpatch.demo import tiny  # noqa: E402


def warm_up() -> Any:
    from transformers import modeling_utils

    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8
        ))  # fmt: skip
    places = {name: "cuda:0" for name, _ in model.named_parameters()}
    return modeling_utils.caching_allocator_warmup(model, places, None)


def test_the_whole_is_not_reserved_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((AssertionError, RuntimeError)):  # no CUDA
        warm_up()
    with rlpatch.patched() as report:
        warm_up()
        assert report["load_in_pieces"].state == "applied"
    with rlpatch.patched(share_weights=False), pytest.raises((AssertionError, RuntimeError)):
        warm_up()
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64,expandable_segments:True")
    with rlpatch.patched(), pytest.raises((AssertionError, RuntimeError)):
        warm_up()


def test_models_load_as_ever(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"})
    with rlpatch.patched():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"})
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))
