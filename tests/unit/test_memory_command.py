"""``python -m rlpatch plan``: what it prints, its exit status, and that it imports nothing heavy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlpatch.__main__ import main

ARGUMENTS = ["plan", "--model", "8b", "--gpu", "80GiB", "--lora", "32", "--optim", "adamw_8bit", "--max-length", "8192",
             "--num-generations", "2"]  # fmt: skip


def run(capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, str, str]:
    try:
        status = main([*ARGUMENTS, *more])
    except SystemExit as error:  # argparse
        status = int(error.code or 0)
    out, err = capsys.readouterr()
    return status, out, err


def document(capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    status, out, _ = run(capsys, "--json", *more)
    made: dict[str, Any] = json.loads(out)
    assert status == (1 if made["refusal"] else 0)
    return made


def test_it_tells_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys)
    assert (status, err) == (0, "")
    for text in (
        "weights, shared",
        "KV cache",
        "gpu_memory_utilization: 0.",
        "longest context in rollouts",
        "in training",
        "all that rollouts",
    ):
        assert text in out


def test_json_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    made = document(capsys)
    assert made["schema"] == 1 and made["parameters"] == 8_190_735_360 and made["device"] == 80 << 30
    assert {t["name"] for t in made["terms"]} >= {"weights, shared", "LoRA", "optimizer state", "margin"}
    assert made["kv_cache_memory_bytes"] + made["generating"] <= 80 << 30
    assert made["sequences"] == 2


def test_the_optimizer_s_state_is_parked_where_it_does_not_fit_otherwise(capsys: pytest.CaptureFixture[str]) -> None:
    """As `apply` does."""
    long = ("--model", "4b", "--lora", "0", "--attention", "flash", "--max-length", "78000")
    long = (*long, "--no-expandable-segments")
    here, auto = document(capsys, *long, "--no-park-optimizer"), document(capsys, *long)
    assert here["refusal"] and auto["refusal"] is None and "waits in host memory" in auto["notes"][-1]
    assert auto["training"] < 80 << 30 < here["training"] and auto == {
        **document(capsys, *long, "--park-optimizer"), "notes": auto["notes"]
    }  # fmt: skip
    long = (*long, "--batch", "4")
    hopeless, here = document(capsys, *long), document(capsys, *long, "--no-park-optimizer")
    assert hopeless["refusal"] and hopeless["training"] < here["training"]  # nearer, at least


def test_segments_are_expanded_where_it_does_not_fit_otherwise(capsys: pytest.CaptureFixture[str]) -> None:
    long = ("--attention", "flash", "--max-length", "58000")
    here, auto = document(capsys, *long, "--no-expandable-segments"), document(capsys, *long)
    assert here["refusal"] and auto["refusal"] is None and "expands its segments" in auto["notes"][-1]
    assert auto == {**document(capsys, *long, "--expandable-segments"), "notes": auto["notes"]}
    assert document(capsys, *long, "--processes", "2")["refusal"]  # not tried there
    short = document(capsys)
    assert short == document(capsys, "--no-expandable-segments", "--no-park-optimizer")


def test_options_reach_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    base = document(capsys)
    assert document(capsys, "--kv-cache-dtype", "fp8")["block_bytes"] * 2 == base["block_bytes"]
    assert document(capsys, "--reserve", "10GiB")["left_blocks"] < base["left_blocks"]
    assert document(capsys, "--margin", "1MiB")["left_blocks"] > base["left_blocks"]
    assert document(capsys, "--lora-targets", "q_proj,v_proj")["left_blocks"] > base["left_blocks"]
    assert document(capsys, "--no-gradient-checkpointing")["training"] > base["training"]
    assert "CUDA graphs" not in {t["name"] for t in document(capsys, "--enforce-eager")["terms"]}
    assert (
        document(capsys, "--lora", "0", "--beta", "0.1", "--gpu", "400GiB", "--precision", "masters")["refusal"] is None
    )
    assert document(capsys, "--load-in-4bit")["left_blocks"] > base["left_blocks"]
    assert document(capsys, "--lora-casts")["training"] > base["training"]  # which `apply` leaves out
    assert document(capsys, "--full-logits")["training"] > base["training"]
    assert document(capsys, "--batch", "1")["sequences"] == 1
    assert base["sized_by"] == "all that rollouts can fill" and base["kv_tokens"] == 2 * 8192 + 256
    assert document(capsys, "--block-size", "16")["kv_tokens"] == 2 * 8192 + 16
    assert document(capsys, "--max-num-seqs", "64")["sized_by"] == "all that is left"


def test_a_plan_that_does_not_fit_exits_1(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "--gpu", "T4")
    assert status == 1 and "does not fit: the weights of 8b take 15.26 GiB" in " ".join(out.split())
    assert "longest context" not in out


def test_a_utilization_that_cannot_be_honoured_is_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    made = document(capsys, "--gpu-memory-utilization", "0.95")
    assert any("0.95 cannot be honoured" in w and f"{made['gpu_memory_utilization']:g}" in w for w in made["warnings"])
    assert document(capsys, "--gpu-memory-utilization", "0.4")["warnings"] == []


def test_a_rollout_that_trl_refuses_is_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    assert any("no multiple" in w for w in document(capsys, "--batch", "3")["warnings"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--gpu", "80 gigs"], "--gpu '80 gigs': neither a size"),
        (["--gpu", "0"], "neither a size"),
        (["--model", "9b"], "--model '9b': no such folder"),
        (["--lora", "-3"], "--lora -3"),
        (["--lora", "5000"], "above the model's hidden size 4096"),
        (["--lora-targets", "c_attn"], "no linear layer c_attn"),
        (["--lora", "0", "--load-in-4bit"], "--load-in-4bit"),
        (["--lora", "0", "--lora-slots"], "--lora-slots"),
        (["--load-in-4bit", "--precision", "fp32"], "--precision fp32"),
        (["--optim", "muon"], "optim='muon'"),
        (["--max-length", "512"], "--max-length 512 leaves nothing"),
        (["--max-completion-length", "100"], "contradict"),
        (["--max-length", "200000"], "max_position_embeddings"),
        (["--num-generations", "1"], "at least 2"),
        (["--batch", "0"], "batch=0"),
        (["--gradient-accumulation-steps", "0"], "accumulation=0"),
        (["--kv-cache-dtype", "int3"], "kv_dtype='int3'"),
        (["--gpu-memory-utilization", "1.5"], "gpu_memory_utilization=1.5"),
        (["--margin", "-1"], "--margin"),
        (["--reserve", "lots"], "--reserve 'lots'"),
        (["--beta", "-1"], "--beta"),
        (["--block-size", "0"], "block_size=0"),
    ],
)
def test_wrong_usage_exits_2_and_names_the_option(
    capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    status, out, err = run(capsys, *options)
    assert status == 2 and out == ""
    assert words in err and "Traceback" not in err


def test_a_config_without_its_fields_exits_2(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    status, _, err = run(capsys, "--model", str(tmp_path))
    assert (
        status == 2 and "no hidden_size, num_hidden_layers, num_attention_heads, vocab_size, intermediate_size" in err
    )


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; from rlpatch.__main__ import main; import rlpatch.memory\n"
        f"status = main({ARGUMENTS!r})\n"
        "print('LOADED', sorted({'torch', 'vllm', 'trl', 'transformers', 'numpy'} & set(sys.modules))); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "LOADED []" in done.stdout
