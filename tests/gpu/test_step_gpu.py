"""What shortens starts and steps, on a real GPU: ``fast-start``, forward passes that wait for their loss, LoRA inputs as
they are. Skips itself without CUDA.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs CUDA", allow_module_level=True)
pytest.importorskip("vllm")
pytest.importorskip("trl")

from gpu_trainer import greedy, patched_trainer  # noqa: E402

import rlpatch  # noqa: E402
from rlpatch import phases  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

MICRO_BATCHES, STEPS = 4, 3


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    lora = {"r": 32, "target_modules": "all-linear"}
    yield from patched_trainer(
        tmp_path_factory.mktemp("model"), None, steps=STEPS, lora=lora, compile="fast-start", learning_rate=1e-5,
        gradient_accumulation_steps=MICRO_BATCHES, max_completion_length=64,
    )  # fmt: skip


def test_the_engine_starts_without_torch_compile(trainer: Any) -> None:
    config = trainer.vllm_generation.llm.llm_engine.vllm_config.compilation_config
    assert config.mode.name == "NONE" and config.cudagraph_mode.name == "FULL_DECODE_ONLY"
    sequences = trainer.args.per_device_train_batch_size * MICRO_BATCHES
    assert max(config.cudagraph_capture_sizes) == sequences
    (pair,) = rlpatch.status().pairs
    settings = {entry["why"].partition(":")[0] for entry in pair["compile"]["set"]}
    assert {"decode-graphs", "model-info", "capture-sizes", "no-kernel-autotune", "plain-sampling"} <= settings
    assert all(len(tokens) for tokens in greedy(trainer))


def test_every_micro_batch_is_computed_once(trainer: Any) -> None:
    """The KV cache is gone by then, and on a card with room all of them wait."""
    (pair,) = phases.live()
    assert pair.memory is not None and pair.memory.plan is not None
    assert pair.memory.plan.passes_beside() >= MICRO_BATCHES - 1
    passes: list[bool] = []
    hook = trainer.model.register_forward_pre_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    try:
        trainer.train()
    finally:
        hook.remove()
    assert passes == [True] * MICRO_BATCHES * STEPS
    assert not any(name.startswith("_rlpatch_scor") for name in vars(trainer))
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == STEPS and all(row["sampling/sampling_logp_difference/mean"] < 0.1 for row in rows)


def test_lora_reads_its_input_as_it_is(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same gradients, bit for bit, in less memory."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from rlpatch.adapters.peft import lora_casts_v0_15 as adapter

    assert str(rlpatch.status()["lora_casts"].state) == "applied"
    model = trainer.model.train()
    ids = torch.arange(2 * 512, device="cuda").remainder(900).view(2, 512) + 5
    results = {}
    for casts in (True, False):
        with monkeypatch.context() as patch:
            if casts:
                patch.setattr(adapter, "_for_nothing", lambda *_: False)
            model.zero_grad()
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            # the other backends add up gradients in any order
            with torch.autocast("cuda", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
                model(input_ids=ids, use_cache=False).logits.float().logsumexp(-1).sum().backward()
            found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            results[casts] = found, torch.cuda.max_memory_allocated() - before
    model.zero_grad()
    (cast, more), (bare, less) = results[True], results[False]
    assert cast.keys() == bare.keys() and len(cast) > 100
    assert all(torch.equal(cast[name], bare[name]) for name in cast)
    assert less < more
