"""Sizes and models from text: what parses, what is refused, and with which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlpatch.errors import UsageError
from rlpatch.memory import from_config, parse_device, parse_size, read
from rlpatch.memory.sizes import GIB, show

hypothesis = pytest.importorskip("hypothesis")
given, st = hypothesis.given, hypothesis.strategies

QWEN3_8B: dict[str, Any] = dict(
    model_type="qwen3", hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, vocab_size=151936, max_position_embeddings=40960, dtype="bfloat16",
)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("80GiB", 80 * GIB), ("80GB", 80 * 10**9), ("80G", 80 * GIB), ("85899345920", 85899345920),
        ("1.5 gib", 3 * GIB // 2),
        (".5g", GIB // 2), ("512MiB", 1 << 29), ("3 kB", 3000), (7, 7), ("0.1MB", 100_000), ("1.", 1),
    ],
)  # fmt: skip
def test_sizes_parse(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1GiB", "80 giga", "1e9", "nan", "inf", "0", "0.1", "1,5GiB", "9" * 40, True]
)
def test_what_is_no_size_is_named(text: Any) -> None:
    with pytest.raises(UsageError, match="--reserve"):
        parse_size(text, "--reserve")


@given(st.integers(1, 10**15), st.sampled_from(["", "B", "KiB", "kb", "MiB", "GB", "g", "TiB"]))
def test_whole_numbers_of_a_unit_come_back_exactly(number: int, unit: str) -> None:
    one = parse_size(f"1{unit}")
    assert parse_size(f"{number}{unit}") == number * one
    assert parse_size(f"{number}.0 {unit.upper()}") == number * one


@given(st.integers(GIB, 1 << 50))
def test_what_is_shown_parses_to_about_the_same(size: int) -> None:
    assert abs(parse_size(show(size)) - size) <= 0.005 * GIB + 1


def test_cards() -> None:
    assert parse_device("H200") <= 150109880320 < parse_device("H200") + GIB // 50  # measured
    assert parse_device("NVIDIA H100") == parse_device("h100-80gb") < 80 * GIB
    assert parse_device("RTX 4090") == parse_device("4090") < 24 * GIB
    assert parse_device("A100 40GB") < parse_device("a100_80gb")
    assert parse_device("24GiB") == 24 * GIB
    with pytest.raises(UsageError, match=r"'H1000': neither a size .* nor a known card .*H100"):
        parse_device("H1000")


# ---- models ----------------------------------------------------------------------------------------------------------


def test_a_config_is_counted() -> None:
    shape = from_config(QWEN3_8B)
    assert shape.parameters == 8_190_735_360  # Qwen3ForCausalLM of this config; bench: 16381470720 bytes resident
    assert shape.bytes("bf16") == 16_381_470_720
    assert not shape.notes


def test_missing_fields_are_all_named(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4}))
    with pytest.raises(UsageError, match=r"config\.json: no num_hidden_layers, vocab_size, intermediate_size"):
        read(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": "36"}, "num_hidden_layers is '36'"),
        ({"num_key_value_heads": 5}, "no multiple of num_key_value_heads 5"),
        ({"dtype": "int3"}, "expected one of"),
        ({"kv_lora_rank": 512}, "multi-head latent attention"),
        ({"layer_types": ["linear_attention"]}, "linear attention"),
        ({"model_type": "gpt2", "n_embd": 10, "n_head": 3}, "no multiple of num_attention_heads|head_dim"),
    ],
)
def test_what_cannot_be_planned_is_refused(change: dict[str, Any], message: str) -> None:
    config = {**QWEN3_8B, **change}
    if change.get("model_type") == "gpt2":
        config = {"model_type": "gpt2", "n_embd": 10, "n_head": 3}
    with pytest.raises(UsageError, match=message):
        from_config(config)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        read(tmp_path / "nothing")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UsageError, match="cannot be read as JSON"):
        read(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UsageError, match="expected an object"):
        read(tmp_path)


def test_an_unknown_family_is_counted_like_llama_and_says_so() -> None:
    shape = from_config({**QWEN3_8B, "model_type": "new"})
    assert any("'new' is not known" in note for note in shape.notes)


def test_a_language_model_within_another_is_found() -> None:
    shape = from_config({"model_type": "outer", "text_config": QWEN3_8B})
    assert shape.parameters == 8_190_735_360
    assert any("comes on top" in note for note in shape.notes)


def _weights(file: Path, **shapes: list[int]) -> None:
    header = json.dumps(
        {name: {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}
    )
    file.write_bytes(len(header).to_bytes(8, "little") + header.encode())


def test_weights_beside_the_config_count(tmp_path: Path) -> None:
    small = {**QWEN3_8B, "hidden_size": 8, "intermediate_size": 8, "vocab_size": 10, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(small))
    plain = read(tmp_path).parameters
    _weights(tmp_path / "model.safetensors", tower=[plain, 3])
    assert read(tmp_path).parameters == 3 * plain
    assert any("weight files" in note for note in read(tmp_path).notes)
    _weights(tmp_path / "model.safetensors", less=[2])
    assert read(tmp_path).parameters == plain
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    assert read(tmp_path).parameters == plain
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(UsageError, match="not a safetensors file"):
        read(tmp_path)


def test_lora_targets() -> None:
    shape = from_config(QWEN3_8B)
    assert {t.name for t in shape.linears()} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    assert [t.name for t in shape.linears(("self_attn.q_proj", "v_proj"))] == ["q_proj", "v_proj"]
    with pytest.raises(UsageError, match="no linear layer c_attn; it has down_proj"):
        shape.linears(("c_attn",))
