"""The arithmetic of the plan's bench, and what it prints; no torch."""

from __future__ import annotations

from typing import Any

import pytest

from rlpatch.bench import plan
from rlpatch.bench.held import GENERATING, TRAINING, Peaks, compare

GIB = 2**30


def term(name: str, size: int) -> dict[str, Any]:
    return {"name": name, "bytes": size}


PLAN: dict[str, Any] = {
    "device": 80 * GIB, "available": 79 * GIB, "kv_cache_memory_bytes": 10 * GIB, "generating": 30 * GIB,
    "training": 50 * GIB,
    "terms": [
        term("weights, shared", 16 * GIB), term("optimizer state", 12 * GIB), term("CUDA context", GIB),
        term("engine buffers", GIB // 2), term("CUDA graphs", GIB // 4), term("pinned by the allocator", GIB),
        term("gradients", 16 * GIB), term("margin", GIB),
    ],
    "moments": {"loss": 6 * GIB, "backward": 18 * GIB, "embedding": 19 * GIB, "step": 16 * GIB},
}  # fmt: skip
NOTHING: dict[str, int | None] = dict.fromkeys(
    ("weights", "fp32 masters", "optimizer state", "gradients", "LoRA", "reference model", "KV cache", "context", "engine",
     "cached", "outside torch", "loss", "backward", "step", "peak", "unused at peak", "generating", "training")
)  # fmt: skip


def rows(cuda: bool = True, **held: int) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in compare(PLAN, {**NOTHING, **held}, cuda)}


def test_terms_stand_beside_what_was_measured() -> None:
    found = rows(
        weights=16 * GIB, **{"KV cache": 9 * GIB, "optimizer state": 12 * GIB + 1}, loss=6 * GIB, backward=25 * GIB
    )
    assert found["weights"]["difference"] == 0 and found["weights"]["near"]
    assert found["optimizer state"]["difference"] == -1
    assert found["KV cache"]["difference"] == GIB and found["KV cache"]["near"] is False
    assert found["training: head and loss"]["planned"] == 6 * GIB
    assert found["training: backward pass"]["planned"] == 19 * GIB  # its end included
    assert found["training: backward pass"]["near"] is False
    assert found["training: the highest of these"]["planned"] == 19 * GIB
    assert found["training: the highest of these"]["why"] == "not measured"
    assert "LoRA" not in found and "reference model" not in found  # neither planned nor there


def test_others_are_subtracted_and_a_total_that_is_too_small_is_told() -> None:
    found = rows(generating=40 * GIB, training=51 * GIB + 1)  # one GiB of these is others'
    assert found[GENERATING]["planned"] == found[GENERATING]["measured"] == 39 * GIB
    assert found[GENERATING]["too_small"] is False and found[GENERATING]["margin"] == GIB
    assert found[TRAINING]["measured"] == 50 * GIB + 1 and found[TRAINING]["too_small"] is True


def test_on_a_cpu_it_says_so() -> None:
    found = rows(cuda=False, weights=16 * GIB)
    assert found["weights"]["why"] is None
    for name in ("CUDA context", "pinned, generating", "training: backward pass", TRAINING):
        assert found[name]["measured"] is None and found[name]["why"] == "a CPU has no such memory"
    peaks = Peaks(False)
    peaks.start()
    peaks.mark("forward")
    assert not peaks.sections


def test_the_table() -> None:
    held = {**NOTHING, "weights": 16 * GIB, "training": 52 * GIB, "generating": 30 * GIB}
    document: dict[str, Any] = {
        "job": {"completions": 8, "completion_tokens": 512, "prompt_tokens": 64, "micro_batch": 8},
        "device": {"name": "a card"},
        "versions": {"vllm": "1", "trl": "2", "torch": "3"},
        "settings": {
            "8b full": {"text": "all of it", "result": {"rows": compare(PLAN, held), "problems": ["step: broken"]}},
            "8b adam-8bit": {"text": "8 bits", "skipped": "bitsandbytes does not import"},
            "8b lora": {"text": "r=32", "error": {"text": "boom", "stage": "load"}, "log": ["last words"]},
            "8b reference": {
                "text": "beta",
                "result": {"rows": [], "problems": [], "plan": {"reason": "switched off"}},
            },
        },
    }
    text = plan.table(document)
    for words in (
        "TOO SMALL", "OFF, margin 1.00 GiB", "exact", "not measured: step: broken", "skipped: bitsandbytes", "boom in load",
        "last words", "no plan: switched off",
    ):  # fmt: skip
        assert words in text


def test_settings_and_shapes() -> None:
    assert plan.chosen(plan.parse([]), True) == [
        *(("0.6b", name) for name in ("lora", "full", "adam-8bit", "script-lora", "script-full", "reference")),
        ("8b", "lora"), ("8b", "full"), ("8b", "script-lora"),
    ]  # fmt: skip
    assert plan.chosen(plan.parse([]), False) == [("tiny", name) for name in plan.SETTINGS]
    assert plan.chosen(plan.parse(["--settings", "full"]), True) == [("0.6b", "full")]
    both = plan.parse(["--shapes", "0.6b,4b", "--settings", "full,lora,full"])
    assert plan.chosen(both, True) == [("0.6b", "full"), ("0.6b", "lora"), ("4b", "full"), ("4b", "lora")]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--settings", "most"], "--settings most: known are lora, full"),
        (["--shapes", ","], "--shapes ,: known are tiny"),
        (["--steps", "1"], "--steps: at least 2"),
        (["--micro-batch", "3"], "--micro-batch 3: does not divide --completions 8"),
        (["--emulate-gib", "0"], "--emulate-gib: more than 0"),
        (["--completion-tokens", "0"], "--completion-tokens: at least 1"),
    ],
)
def test_wrong_options_end_with_status_2(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        plan.main(arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_peaks_by_section(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's counters, played: (allocated, most allocated since the last look, most reserved)."""
    torch = pytest.importorskip("torch")
    now = [100, 100, 120]
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: now[1])
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: now[2])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    peaks = Peaks(True)
    peaks.mark("before a rollout")
    peaks.start()
    now[:] = [130, 150, 160]
    peaks.mark("forward")
    now[:] = [110, 180, 200]
    peaks.mark("backward")
    now[:] = [105, 140, 200]
    peaks.mark("forward")
    assert peaks.sections == {"forward": 50, "backward": 80} and peaks.after == {"forward": 30, "backward": 10}
    assert peaks.top == {"allocated": 180, "reserved": 200}
