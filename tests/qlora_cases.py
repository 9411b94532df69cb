"""QLoRA: one copy of the 4-bit base, the adapter through vLLM's LoRA slots.

The same tests for both tiers (`tests/cpu/test_qlora.py`, `tests/gpu/test_qlora_gpu.py`, which import all of this): on CUDA
with graphs and compilation on. Skipped without bitsandbytes, and where the installed vLLM cannot hold such weights. One
pair for all tests (double quantization on); each test leaves it usable.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
for library in ("vllm", "trl", "peft", "bitsandbytes"):
    pytest.importorskip(library)

import rlpatch  # noqa: E402
from rlpatch import phases  # noqa: E402
from rlpatch.adapters.vllm._bitsandbytes import IN_TREE, PLUGIN, flat_absmax, has  # noqa: E402
from rlpatch.demo import tiny, worker  # noqa: E402
from rlpatch.sharing.account import resident_bytes  # noqa: E402
from rlpatch.sharing.quantized import QuantizedSharing, data_twice, is_packed, is_quantized, states_twice  # noqa: E402

if not has(IN_TREE) and not has(PLUGIN):
    pytest.skip("this vLLM has no bitsandbytes", allow_module_level=True)

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
STEPS = 4
LENGTH = 48
PROMPTS = [[5 + (7 * i + j) % 900 for i in range(40)] for j in range(4)]
WORDS, SHAPE = (
    (
        4000,
        dict(
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=8,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=2048,
        ),
    )
    if CUDA
    else (
        1000,
        dict(
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=2048,
        ),
    )
)
ENGINE = {"enforce_eager": not CUDA, "kv_cache_memory_bytes": (4 << 30) if CUDA else (64 << 20), "dtype": "bfloat16"}
CONFIG = {"vllm_max_model_length": 512, "max_completion_length": 16, "bf16": CUDA}


def snapshot(model: Any) -> dict[str, tuple[Any, ...]]:
    """Bytes and fp32 absmax of every 4-bit weight of the trainer, copied; the absmax as bitsandbytes would compute it."""
    found = {}
    for name, weight in model.named_parameters():
        if is_quantized(weight):
            state = weight.quant_state
            absmax = flat_absmax(state) if state.nested else state.absmax.clone()
            found[name.replace("base_model.model.", "").replace(".base_layer", "")] = (weight.data.clone(), absmax)
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """(trainer, snapshot of the base before trainer and engine were built)."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import trl
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, set_seed

    path = tiny.write_model(tmp_path_factory.mktemp("model"), "qwen3", words=WORDS, dtype="bfloat16", **SHAPE)
    rlpatch.apply(strict=True, defaults=False)
    defaults = worker.engine_defaults(**ENGINE)
    defaults.apply()
    try:
        set_seed(0)
        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.bfloat16,
            device_map={"": DEVICE},
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.bfloat16,
            ),
        )
        before = snapshot(model)
        prompts = [" ".join(f"w{(7 * i + 3 * j) % 58}" for j in range(3 + i % 5)) for i in range(64)]
        trainer = trl.GRPOTrainer(
            model=model,
            args=trl.GRPOConfig(
                output_dir=str(tmp_path_factory.mktemp("out")),
                use_vllm=True,
                vllm_mode="colocate",
                vllm_gpu_memory_utilization=0.3,
                per_device_train_batch_size=8,
                num_generations=4,
                learning_rate=1e-3,
                lr_scheduler_type="constant",
                max_steps=STEPS,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                gradient_checkpointing=False,
                use_cpu=DEVICE == "cpu",
                **CONFIG,
            ),
            reward_funcs=worker.reward_target_words,
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
    finally:
        defaults.revert()
    yield trainer, before
    rlpatch.revert()


@pytest.fixture
def trainer(run: Any) -> Any:
    return run[0]


@pytest.fixture
def pair(trainer: Any) -> phases.Colocation:
    found = phases.of_engine(trainer.vllm_generation.llm)
    assert found is not None and found.engine is not None
    return found


def generate(trainer: Any, temperature: float = 0.0) -> tuple[list[list[int]], list[list[float]]]:
    """Tokens, and the log-probability that the engine gave each when it sampled it."""
    generation = trainer.vllm_generation
    generation.temperature, generation.max_completion_length = temperature, LENGTH
    _, completions, logprobs, _ = generation.generate(prompts=PROMPTS, images=None, num_generations=1)
    return [list(ids) for ids in completions], [[token[0] for token in row] for row in logprobs]


@torch.no_grad()
def distance(trainer: Any, completions: list[list[int]], logprobs: list[list[float]]) -> float:
    """Mean gap between the engine's log-probabilities (at temperature 1) and the trainer's own for the same tokens."""
    gaps = []
    for prompt, tokens, engine in zip(PROMPTS, completions, logprobs, strict=True):
        ids = torch.tensor([prompt + tokens], device=DEVICE)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            logits = trainer.model(ids).logits[0, len(prompt) - 1 : -1].float()
        mine = logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]
        gaps.append((mine - torch.tensor(engine, device=DEVICE)).abs())
    return float(torch.cat(gaps).mean())


def disturb(trainer: Any, seed: int) -> dict[str, Any]:
    """Give the adapters values that matter; returns the old ones."""
    old = {}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_" in name:
                old[name] = parameter.detach().clone()
                scale = 0.02 if "lora_B" in name else 0.05
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return old


def put(trainer: Any, values: dict[str, Any]) -> None:
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if name in values:
                parameter.copy_(values[name])


def assert_one_copy(trainer: Any, pair: phases.Colocation) -> None:
    engine = pair.engine.model
    storages = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in engine.parameters() if is_packed(p)
    }
    for name, weight in trainer.model.named_parameters():
        if is_quantized(weight):
            place = weight.data_ptr()
            assert any(s <= place and place + weight.numel() <= s + n for s, n in storages.items()), name
    assert data_twice(trainer.model, engine) == 0
    assert states_twice(trainer.model, engine) == 0


def assert_base_unchanged(trainer: Any, before: dict[str, tuple[Any, ...]]) -> None:
    now = snapshot(trainer.model)
    assert now.keys() == before.keys() and now
    for name, tensors in before.items():
        assert all(torch.equal(a, b) for a, b in zip(now[name], tensors, strict=True)), name


def test_the_4_bit_base_is_one_copy(run: Any, trainer: Any, pair: phases.Colocation) -> None:
    assert isinstance(pair.sharing, QuantizedSharing) and pair.refusal is None
    report, sizes = pair.sharing.report(), pair.sharing.quantization()
    assert not report.copied, report.copied
    assert sizes["weights"] == len(run[1]) == 7 * SHAPE["num_hidden_layers"]
    assert sizes["absmax_bytes"] * 8 == sizes["data_bytes"]  # 4 bytes for each block of 64 weights of half a byte
    engine = [p for p in pair.engine.model.parameters() if is_packed(p)]
    assert resident_bytes(engine) >= sizes["data_bytes"] == sum(p.numel() for p in engine)
    assert_one_copy(trainer, pair)
    assert_base_unchanged(trainer, run[1])


def test_graphs_and_compilation_are_as_asked(trainer: Any) -> None:
    config = trainer.vllm_generation.llm.llm_engine.vllm_config
    assert config.quant_config is not None and config.lora_config is not None
    assert bool(config.model_config.enforce_eager) == bool(ENGINE["enforce_eager"])


def test_the_adapter_is_served_by_slots(pair: phases.Colocation) -> None:
    assert pair.lora is not None and pair.lora.mode == "slots", pair.lora


def test_training_leaves_the_base_alone(run: Any, trainer: Any, pair: phases.Colocation) -> None:
    addresses = {name: p.data_ptr() for name, p in pair.engine.model.named_parameters()}
    absmax = [bound.absmax.data_ptr() for bound in pair.sharing.bound]
    adapters = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "lora_B" in n}
    trainer.train()
    rows = [row["sampling/sampling_logp_difference/mean"] for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == STEPS and max(rows) < 0.1, rows
    assert any(not torch.equal(p, adapters[n]) for n, p in trainer.model.named_parameters() if n in adapters)
    assert {name: p.data_ptr() for name, p in pair.engine.model.named_parameters()} == addresses
    assert [bound.absmax.data_ptr() for bound in pair.sharing.bound] == absmax
    assert_one_copy(trainer, pair)
    assert_base_unchanged(trainer, run[1])


def test_generation_follows_the_adapter(run: Any, trainer: Any) -> None:
    trainer.vllm_generation.sync_weights()
    first, _ = generate(trainer)
    old = disturb(trainer, seed=1)
    try:
        trainer.vllm_generation.sync_weights()
        second, _ = generate(trainer)
        far = distance(trainer, *generate(trainer, temperature=1.0))
    finally:
        put(trainer, old)
    trainer.vllm_generation.sync_weights()
    third, _ = generate(trainer)
    near = distance(trainer, *generate(trainer, temperature=1.0))
    assert second != first and third == first
    assert max(near, far) < 0.1, (near, far)
    assert_base_unchanged(trainer, run[1])


def test_a_stale_adapter_would_be_seen(trainer: Any) -> None:
    """The bound of the tests above is worth something: with another adapter in the trainer the gap is far larger."""
    trainer.vllm_generation.sync_weights()
    sampled = generate(trainer, temperature=1.0)
    old = disturb(trainer, seed=2)
    try:
        assert distance(trainer, *sampled) > 0.15  # of the bound, 0.1, and of what the tests above see, 0.01
    finally:
        put(trainer, old)


def test_zz_parting_leaves_an_ordinary_4_bit_trainer(run: Any, trainer: Any, pair: phases.Colocation) -> None:
    """Last: the pair is no pair afterwards."""
    model, engine = trainer.model, pair.engine.model
    mine = sum(w.numel() for w in model.parameters() if is_quantized(w))
    pair.part()
    assert data_twice(model, engine) == mine
    assert all(w.quant_state.nested for w in model.parameters() if is_quantized(w))
    assert_base_unchanged(trainer, run[1])
