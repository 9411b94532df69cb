"""The plan's arithmetic: against an H200, against itself (properties), and where it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlpatch.bench.held import compare
from rlpatch.errors import UsageError
from rlpatch.memory import Engine, ModelShape, Plan, Training, fit_blocks, from_config, plan
from rlpatch.memory.command import shapes
from rlpatch.memory.engine import fill_blocks, graph_sizes, kv_block_bytes
from rlpatch.memory.model import FAMILIES
from rlpatch.memory.optimizers import OPTIMIZERS, Trainable, optimizer
from rlpatch.memory.planning import ASKED, BOTH, FILL, GENERATING, LEFT, TRAINING
from rlpatch.memory.sizes import GIB, MIB
from rlpatch.memory.training import measure, quantized_bytes

hypothesis = pytest.importorskip("hypothesis")
given, settings, st = hypothesis.given, hypothesis.settings, hypothesis.strategies

ROOT = Path(__file__).resolve().parents[2]
QWEN3_8B: dict[str, Any] = dict(
    model_type="qwen3", hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, vocab_size=151936, max_position_embeddings=132 * 1024, dtype="bfloat16",
)  # fmt: skip
EIGHT = from_config(QWEN3_8B, "8b")
SMALL = from_config(
    {**QWEN3_8B, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "vocab_size": 4000}
)
H200 = 150_109_880_320


def make(model: ModelShape = EIGHT, device: int = H200, engine: dict[str, Any] | None = None, **training: Any) -> Plan:
    how = Training(**{"batch": 8, "prompt": 64, "completion": 256, **training})
    return plan(model, how, Engine(**{"max_num_seqs": how.batch, **(engine or {})}), device)


def casts(result: dict[str, Any]) -> bool:
    """Whether PEFT cast the adapters' inputs when this was measured; results from before ``lora_casts`` do not name it."""
    outcomes = (result.get("status") or {}).get("outcomes", ())
    applied = {one["capability"] for one in outcomes if one["state"] == "applied"}
    return "lora_casts" not in applied | set(result.get("in_force", ()))


# ---- measured --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("release", ["0.25.1", "0.33.0"])
@pytest.mark.parametrize(("name", "rank"), [("full", 0), ("lora32", 32)])
def test_an_h200_needed_no_more_and_not_much_less(name: str, rank: int, release: str) -> None:
    """Device memory by phase of the bench's sharing runs: the plan is above each, by 5 % or 0.5 GiB of it at most."""
    file = ROOT / "bench" / "results" / f"h200-8b-{name}-vllm{release}.json"
    if not file.is_file():
        pytest.skip("the bench's results are not packaged")
    document = json.loads(file.read_text())
    job = document["job"]
    variant = next((v for v in ("rlpatch", "rlpatch-fold") if v in document["variants"]), None)
    if variant is None or job["completion_tokens"] != 256:
        pytest.skip("another bench")
    result = document["variants"][variant]["runs"][0]["result"]
    used = {phase: spans["max"] for phase, spans in result["memory"]["by_phase"].items()}
    sharing = next(iter(result["status"].get("pairs") or [{}]), {}) if result["status"] else {}
    twice = 0
    if rank and not (sharing.get("sharing") or {}).get("shared"):
        twice = EIGHT.bytes("bfloat16")  # runs from before a LoRA's base was shared
        if result["memory"]["after_release"] < 2 * twice:
            twice = 0
    made = plan(
        EIGHT,
        Training(
            rank=rank,
            batch=job["micro_batch"],
            prompt=job["prompt_tokens"],
            completion=job["completion_tokens"],
            input_casts=casts(result),
        ),
        Engine(max_num_seqs=job["completions"]),
        document["device"]["total_bytes"],
        margin=0,
    )
    fold = sum(t.bytes for t in made.terms if t.name == "fold") if twice else 0
    generating = used["generate"] - result["kv"]["bytes"] - twice
    training = used["train"] - twice
    assert generating <= made.generating - fold <= max(generating * 1.05, generating + GIB / 2)
    assert training <= made.training <= max(training * 1.05, training + GIB / 2)
    assert result["kv"]["bytes"] == result["kv"]["blocks"] * made.block_bytes


def test_a_small_model_on_an_h200_needed_no_more_and_not_much_less() -> None:
    """Device memory by phase, read from the driver: Qwen3-0.6B's shape, full fine-tuning in bf16, fused AdamW, 2 × 1,088
    tokens, vLLM 0.25.1, TRL 1.16; the engine had 132.7 GiB of KV cache."""
    shape = from_config(
        {**QWEN3_8B, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
         "tie_word_embeddings": True}
    )  # fmt: skip
    made = plan(shape, Training(batch=2, prompt=64, completion=1024), Engine(max_num_seqs=2), H200, margin=0)
    generating, training = int(137.86 * GIB) - 142_515_896_320, int(5.95 * GIB)
    assert generating <= made.generating <= generating + GIB / 2
    assert training <= made.training <= training + GIB / 2


SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 32}, "full": {}, "adam-8bit": {"optim": "adamw_8bit"}, "reference": {"reference": True},
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "setting"), [("0.6b", name) for name in SETTINGS] + [("8b", "lora"), ("8b-full", "full")]
)
def test_every_term_is_near_what_an_h200_held(name: str, setting: str) -> None:
    """The six settings of `rlpatch.bench.plan`, measured once, against the plan as it is now."""
    shape = name.removesuffix("-full")
    file = ROOT / "bench" / "results" / f"h200-plan-{'8b-full-' if name == '8b-full' else ''}vllm0.25.1.json"
    if not file.is_file():
        pytest.skip("the bench's results are not packaged")
    document = json.loads(file.read_text())
    job, result = document["job"], document["settings"][f"{shape} {setting}"]["result"]
    measured = result["measured"]
    training = Training(
        batch=job["micro_batch"], prompt=job["prompt_tokens"], completion=job["completion_tokens"],
        input_casts=casts(result), **SETTINGS[setting],
    )  # fmt: skip
    model = from_config(shapes()[shape])
    length = training.prompt + training.completion
    engine = Engine(max_num_seqs=job["completions"], max_model_len=length)
    made = plan(model, training, engine, document["device"]["total_bytes"])
    measured = {"fp32 masters": None, **measured}  # the first results do not tell
    rows = compare({**made.as_dict(), "kv_cache_memory_bytes": measured["KV cache"]}, measured)
    off = {row["name"]: (row["planned"], row["measured"]) for row in rows if row["near"] is False}
    assert len(rows) > 12 and not off
    assert not any(row.get("too_small") for row in rows)


@pytest.mark.parametrize(
    ("name", "shape", "utilization", "training"),
    [
        ("8b-lora32", "8b", 0.75, {"rank": 32}),
        ("8b-lora32", "8b", 0.0, {"rank": 32, "expandable_segments": True}),
        ("4b-full-8bit", "4b", 0.82, {"optim": "adamw_8bit", "parked": True}),
    ],
)
def test_the_longest_context_is_one_that_an_h200_trained(
    name: str, shape: str, utilization: float, training: dict[str, Any]
) -> None:
    """`bench --sweep-context` at 80 GiB: the plan's longest is below the first that failed, and not far below the last that
    did not."""
    file = ROOT / "bench" / "results" / f"h200-80gib-{name}-contexts-vllm0.25.1.json"
    if not file.is_file():
        pytest.skip("the bench's results are not packaged")
    document = json.loads(file.read_text())
    job = document["job"]
    found = next(one for variant, one in document["sweep"]["variants"].items() if variant.startswith("rlpatch"))
    attempts = [attempt for attempt in found["attempts"] if attempt["utilization"] == utilization]
    best = max(attempt["tokens"] for attempt in attempts if attempt["ok"])
    failed = min(attempt["tokens"] for attempt in attempts if not attempt["ok"])
    made = plan(
        from_config(shapes()[shape]),
        # completions of one length need no mask; the sweeps are from before `lora_casts`
        Training(
            batch=job["micro_batch"], prompt=job["prompt_tokens"], attention="flash", input_casts=True, **training
        ),
        Engine(max_num_seqs=job["completions"], eager=True),
        80 * GIB,
        margin=0,
    )
    assert 0.965 * best <= made.training_context - job["prompt_tokens"] < failed


def test_exact_terms_of_eight_billion() -> None:
    made = make()
    assert made["weights, shared"].bytes == 16_381_470_720
    assert made["optimizer state"].bytes == 2 * 16_381_470_720
    assert made["gradients"].bytes == 16_381_470_720
    assert made.block_bytes == 2 * 8 * 128 * 2 * 36 * 16
    lora = make(rank=32)
    assert lora["LoRA"].bytes == 4 * 36 * 32 * (4096 * 2 + 2 * (4096 + 1024) + 4096 * 2 + 3 * (4096 + 12288))


def test_masters_add_four_bytes_and_a_float32_state() -> None:
    made = make(masters=True, device=400 * GIB)
    assert made["fp32 masters"].bytes == 4 * EIGHT.parameters
    assert made["optimizer state"].bytes == 8 * EIGHT.parameters
    assert made["gradients"].bytes == 2 * EIGHT.parameters
    assert made["optimizer's workspace"].bytes == 4 * 151_936 * 4096  # the largest, alone
    added = make(masters=True, device=400 * GIB, accumulation=2)
    assert added["gradients"].bytes == 4 * EIGHT.parameters and "optimizer's workspace" not in {
        t.name for t in added.terms
    }
    assert make(masters=True, device=400 * GIB, optim="stable_adamw")["gradients"].bytes == 4 * EIGHT.parameters
    assert make(masters=True, device=400 * GIB, processes=2)["gradients"].bytes == 4 * EIGHT.parameters


def test_a_parked_state_is_there_while_it_steps() -> None:
    here, away = make(), make(parked=True)
    state = next(term for term in here.terms if term.name == "optimizer state").bytes
    assert here.generating - away.generating == state
    assert (here.peak, away.peak) == ("embedding", "step")  # gradients and state are more than activations are now
    moved = next(term for term in away.terms if term.name == "optimizer state")
    assert (moved.bytes, moved.resident, moved.peak_bytes) == (state, "training", state)
    assert here.training > away.training
    long = {"completion": 60_000, "batch": 2}
    here, away = make(**long), make(parked=True, **long)
    assert away.peak != "step" and here.training - away.training == state
    assert away.training_context > here.training_context


def test_a_float32_trainer_does_not_share() -> None:
    made = make(SMALL, dtype="float32")
    assert made["weights of the trainer"].bytes == 4 * SMALL.parameters
    assert made["weights of the engine"].bytes >= 2 * SMALL.parameters
    assert made["autocast copies"].bytes == 2 * SMALL.parameters


def test_the_embedding_s_gradient_comes_last_and_the_head_s_first() -> None:
    matrix = 2 * 151_936 * 4096
    short, long = make(completion=4096)["gradients"], make(completion=40_000, batch=2)["gradients"]
    assert short.bytes == long.bytes == 2 * EIGHT.parameters
    assert (short.peak_bytes, long.peak_bytes) == (2 * EIGHT.parameters - matrix, matrix)
    assert "the embedding's is not there yet" in short.formula and "the LM head's" in long.formula
    few = make(completion=16)  # what a layer needs is less than that gradient
    assert few.peak == "embedding" and few["gradients"].peak_bytes == 2 * EIGHT.parameters
    tied = from_config({**QWEN3_8B, "tie_word_embeddings": True})
    assert measure(tied, Training()).head_gradient == matrix and measure(tied, Training()).embedding_gradient == 0
    assert make(tied, completion=16)["end of the backward pass"].peak_bytes > matrix
    assert measure(EIGHT, Training(rank=8)).head_gradient == 0


def test_gradients_stay_over_a_rollout_within_an_accumulation() -> None:
    assert make(SMALL, accumulation=4)["gradients"].resident == TRAINING
    assert make(SMALL, accumulation=4, generate_every=2)["gradients"].resident == BOTH
    assert make(SMALL, accumulation=4, generate_every=8)["gradients"].resident == TRAINING


def test_what_is_only_there_when_asked_for() -> None:
    names = {t.name for t in make(SMALL).terms}
    assert not names & {"LoRA", "reference model", "NCCL", "DDP buckets", "fold", "LoRA slots", "fp32 masters"}
    more = {t.name for t in make(SMALL, reference=True, processes=2).terms}
    assert more >= {"reference model", "NCCL", "DDP buckets"}
    assert "fold" in {t.name for t in make(SMALL, rank=8).terms}
    slots = {t.name for t in make(SMALL, rank=8, engine={"lora_slots": 1, "lora_rank": 8}).terms}
    assert "LoRA slots" in slots and "fold" not in slots


def test_the_casts_of_a_lora_s_inputs() -> None:
    """By hand, per token of one layer in bf16: q, k and v share one input, gate and up another, and o's is the attention's;
    at the MLP's product no gradient of the input in float32."""

    def per_token(**how: Any) -> int:
        made = [
            measure(EIGHT, Training(rank=32, batch=1, prompt=0, completion=8192, input_casts=c, **how))
            for c in (True, False)
        ]
        difference = made[0].layer - made[1].layer
        assert difference % 8192 == 0
        return difference // 8192

    saved, peak = 2 * (3 * 4096 + 4096), 2 * 12288 + 4 * 2 * 4096
    assert per_token() == saved + peak
    # of a float32 residual stream autocast makes a copy for each layer; what is left is the attention's output
    assert per_token(residual="float32") == pytest.approx(1.02 * 2 * 4096 + peak, abs=1)
    assert per_token(autocast=False) == 0 == per_token(dtype="float32", compute="float32")
    assert per_token(targets=("k_proj", "v_proj")) == 2 * 1 * 4096 + peak


def test_four_bits() -> None:
    # 4096 × 4096: half a byte each, a uint8 scale per 64, a float32 per 256 scales, offset and codebooks
    assert quantized_bytes(1 << 24) == (1 << 23) + (1 << 18) + (1 << 10) * 4 + 1024 + 4 + 64
    assert quantized_bytes(1 << 24, double_quant=False) == (1 << 23) + (1 << 18) * 4 + 64
    assert make(rank=16, quantized=True)["weights, shared"].bytes < 0.4 * make(rank=16)["weights, shared"].bytes
    with pytest.raises(UsageError, match="4-bit base cannot be trained"):
        Training(quantized=True)


def test_captured_sizes_are_vllms() -> None:
    assert graph_sizes(Engine(max_num_seqs=8)) == 5  # 1 2 4 8 16
    assert graph_sizes(Engine(max_num_seqs=256)) == 3 + 31 + 17
    assert graph_sizes(Engine(eager=True)) == 0


# ---- optimizers ------------------------------------------------------------------------------------------------------


def test_states_by_hand() -> None:
    matrix, norm = Trainable((1000, 300), 2, "bfloat16"), Trainable((300,), 5, "bfloat16")
    assert optimizer("adamw_torch").state_bytes([matrix, norm]) == 2 * 2 * (600_000 + 1500)
    blocks = -(-300_000 // 256)
    assert optimizer("adamw_8bit").state_bytes([matrix, norm]) == 2 * 2 * (300_000 + 4 * blocks) + 2 * 4 * 1500
    assert optimizer("adamw_8bit").state_bytes([replace(matrix, embedding=True)]) == 2 * 4 * 600_000
    assert optimizer("adafactor").state_bytes([matrix, norm]) == 2 * 4 * 1300 + 4 * 1500
    assert optimizer("lion_8bit").state_bytes([matrix]) == 2 * (300_000 + 4 * blocks)
    assert optimizer("adamw_torch").workspace_bytes([matrix]) == matrix.bytes
    assert optimizer("adamw_torch_fused").workspace_bytes([matrix]) == 0


def test_an_unknown_optimizer_is_named() -> None:
    with pytest.raises(UsageError, match=r"optim='muon'.*adamw_torch_fused"):
        make(SMALL, optim="muon")


# ---- properties ------------------------------------------------------------------------------------------------------

trainings = st.builds(
    Training,
    rank=st.sampled_from([0, 1, 8, 64]),
    optim=st.sampled_from(sorted(OPTIMIZERS)),
    batch=st.integers(1, 16),
    prompt=st.integers(0, 4000),
    completion=st.integers(1, 4000),
    accumulation=st.integers(1, 4),
    generate_every=st.none() | st.integers(1, 8),
    checkpointing=st.booleans(),
    reference=st.booleans(),
    masters=st.booleans(),
    residual=st.sampled_from([None, "float32"]),
    input_casts=st.booleans(),
    head=st.sampled_from(["tiles", "full"]),
    attention=st.sampled_from(["sdpa", "flash", "eager"]),
    processes=st.sampled_from([1, 4]),
    dtype=st.sampled_from(["bfloat16", "float32"]),
    expandable_segments=st.booleans(),
)
engines = st.builds(
    Engine,
    kv_dtype=st.sampled_from(["auto", "fp8"]),
    block_size=st.sampled_from([1, 16, 128]),
    max_num_seqs=st.integers(1, 300),
    eager=st.booleans(),
    shares=st.booleans(),
    counts_weights=st.booleans(),
    counts_graphs=st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(trainings, engines, st.integers(MIB, 200 * GIB), st.integers(0, 20 * GIB), st.none() | st.floats(0.01, 1))
def test_a_plan_adds_up_and_stays_on_the_device(
    training: Training, engine: Engine, device: int, others: int, utilization: float | None
) -> None:
    made = plan(SMALL, training, engine, device, others=others, utilization=utilization)
    assert made.generating == sum(t.bytes for t in made.terms if t.resident != TRAINING)
    assert made.training == sum(t.peak_bytes for t in made.terms if t.resident != GENERATING)
    assert all(0 <= t.peak_bytes <= t.bytes for t in made.terms)
    temporary = sum(t.peak_bytes for t in made.terms if t.resident == TRAINING and t.name != "torn blocks")
    assert temporary <= max(made.moments.values()) <= made.training
    assert all(t.bytes > 0 for t in made.terms)
    assert len({t.name for t in made.terms}) == len(made.terms)
    if made.kv_blocks:
        assert made.generating + made.kv_cache_memory_bytes <= made.available <= device
    assert 0 <= made.gpu_memory_utilization <= 1
    assert made.kv_cache_memory_bytes % made.block_bytes == 0
    if made.refusal is None:
        assert max(made.training, made.loading) <= made.available
        assert training.length <= made.training_context or made.training_context == SMALL.positions
        assert made.kv_blocks * engine.block_size >= training.length
    json.dumps(made.as_dict())


@settings(max_examples=40, deadline=None)
@given(trainings, engines, st.sampled_from(["batch", "prompt", "completion", "rank"]), st.integers(1, 50))
def test_more_of_anything_never_takes_less(training: Training, engine: Engine, what: str, more: int) -> None:
    if what == "rank" and not training.rank:
        training = replace(training, rank=1)
    larger = replace(training, **{what: getattr(training, what) + more})
    before, after = (plan(SMALL, t, engine, 80 * GIB) for t in (training, larger))
    assert after.training >= before.training
    assert after.generating >= before.generating
    assert after.left_blocks <= before.left_blocks
    assert after.kv_blocks >= before.kv_blocks or after.sized_by == LEFT
    if what in ("batch", "rank"):
        assert after.training_context <= before.training_context


@settings(max_examples=40, deadline=None)
@given(trainings, engines)
def test_the_longest_context_is_the_longest(training: Training, engine: Engine) -> None:
    made = plan(SMALL, training, engine, 40 * GIB)
    if training.prompt < made.training_context < SMALL.positions:
        for length, fits in ((made.training_context, True), (made.training_context + 1, False)):
            tried = plan(SMALL, replace(training, completion=length - training.prompt), engine, 40 * GIB)
            assert (tried.training <= 40 * GIB) is fits


@given(trainings)
def test_no_part_is_negative_and_the_moments_are_within_the_sum(training: Training) -> None:
    sizes = measure(SMALL, training)
    parts = (
        sizes.gradients, sizes.checkpoints, sizes.layer, sizes.head, sizes.casts, sizes.embedding, sizes.step,
    )  # fmt: skip
    assert min(*parts, sizes.settled, sizes.unsettled, sizes.largest) >= 0
    assert sizes.head_gradient + sizes.embedding_gradient <= sizes.gradients and sizes.head_weight <= sizes.head
    assert all(sum(moment.values()) <= sum(parts) for moment in sizes.moments.values())


@settings(max_examples=40, deadline=None)
@given(trainings)
def test_without_casts_nothing_takes_more(training: Training) -> None:
    made, bare = (measure(SMALL, replace(training, input_casts=casts)) for casts in (True, False))
    assert bare.checkpoints <= made.checkpoints and bare.layer <= made.layer and bare.largest <= made.largest
    same = replace(made, checkpoints=bare.checkpoints, layer=bare.layer, largest=bare.largest)
    assert same == bare and (bare == made or training.rank)


# ---- forward passes that wait for their backward passes ---------------------------------------------------------------


def test_passes_that_wait_fit_beside_the_peak_by_hand() -> None:
    """8B with a LoRA, 8 × 576 tokens: 36 layers' inputs of 8 KiB a token are 1.27 GiB; the rest is edges, picked hidden
    states, and the adapters' weights that autocast copied."""
    job: dict[str, Any] = {"rank": 32, "completion": 512, "accumulation": 8}
    made = make(**job)
    inputs = 36 * 8 * 576 * 4096 * 2
    assert made.tokens == 8 * 576 and inputs < made.waiting < 1.3 * inputs
    assert made.peak != "step" and made.passes_beside() == (made.available - made.training) // made.waiting > 50
    for count in (0, 1, 3):  # a device of just that size, where the byte before is one too few
        device = made.training + count * made.waiting
        exact = replace(made, available=device)
        assert exact.passes_beside() == count and replace(made, available=device - 1).passes_beside() == max(
            count - 1, 0
        )
    without = make(**job, checkpointing=False)
    assert without.waiting > 5 * made.waiting and without.passes_beside() < made.passes_beside()


def test_what_the_optimizer_needs_does_not_keep_passes_from_waiting() -> None:
    """Nothing waits when it steps; state that is resident counts, also before it exists."""
    made = make(completion=256, accumulation=2, optim="adamw_torch", expandable_segments=True)
    parked = make(completion=256, accumulation=2, optim="adamw_torch", expandable_segments=True, parked=True)
    assert made.peak == parked.peak == "step"
    others = max(size for name, size in made.moments.items() if name != "step")
    room = made.available - (made.training - made.moments["step"]) - others
    assert made.passes_beside() == room // made.waiting > (made.available - made.training) // made.waiting
    assert (parked.passes_beside() - made.passes_beside() + 1) * made.waiting > made["optimizer state"].bytes


def test_shorter_micro_batches_leave_room_for_more() -> None:
    made = make(rank=32, completion=960, accumulation=8, checkpointing=False, batch=2)
    fixed = made["autocast copies"].bytes
    whole = made.passes_beside()
    assert made.passes_beside(made.tokens) == whole > 0
    half = made.passes_beside(made.tokens // 2)
    assert 2 * whole <= half <= 2 * whole + 1 and 0 < fixed < made.waiting / 10
    assert made.passes_beside(2 * made.tokens) <= whole / 4 + 1
    assert made.passes_beside(least=2 * made.waiting) <= whole / 2 < whole  # it was seen to keep more
    assert made.passes_beside(least=1) == whole


@settings(max_examples=60, deadline=None)
@given(trainings, engines, st.integers(MIB, 200 * GIB), st.integers(1, 10**6))
def test_passes_that_wait_are_within_the_device(training: Training, engine: Engine, device: int, tokens: int) -> None:
    made = plan(SMALL, training, engine, device)
    count = made.passes_beside()
    assert count >= 0 and made.passes_beside(tokens) >= 0
    stays = made.training - made.moments[made.peak]
    for moment, size in made.moments.items():
        if count and moment != "step":
            assert stays + size + count * made.waiting <= made.available
    if made.training > made.available and made.peak != "step":
        assert count == 0
    assert made.as_dict()["passes_beside"] == count


@given(st.integers(0, 10**7), st.integers(1, 10**8), st.integers(-(10**9), 10**12), st.integers(0, 10**10))
def test_blocks_that_come_back_fit(wanted: int, block: int, free: int, margin: int) -> None:
    got = fit_blocks(wanted, block, free, margin)
    assert 0 <= got <= wanted
    assert got == 0 or got * block + margin <= free
    assert got == wanted or (got + 1) * block + margin > free


def test_blocks_of_nothing_are_refused() -> None:
    with pytest.raises(UsageError, match="bytes_per_block=0"):
        fit_blocks(1, 0, 1)


# ---- what rollouts can fill ------------------------------------------------------------------------------------------


def test_the_cache_is_no_larger_than_rollouts_can_fill() -> None:
    made = make(engine={"block_size": 16, "told_block_size": True, "max_model_len": 330})
    assert made.sized_by == FILL and made.kv_blocks == 8 * 21 + 1 == made.needed_blocks < made.left_blocks
    assert (
        made.generating + made.kv_left_bytes <= made.available < made.generating + made.kv_left_bytes + made.block_bytes
    )
    assert made.rollout_context > 8 * 330  # what the device would have room for
    own = make(engine={"max_model_len": 330})  # blocks of up to 256 tokens, vLLM's choice
    assert own.kv_tokens == (8 * 2 + 1) * 256
    assert make(engine={"max_model_len": 330, "longest": 4000}).kv_tokens == (8 * 16 + 1) * 256
    few = make(rank=8, device=40 * GIB, completion=4000, engine={"max_num_seqs": 64})
    assert few.sized_by == LEFT and few.kv_blocks == few.left_blocks
    data = made.as_dict()
    assert data["kv_left_bytes"] == made.kv_left_bytes and data["sized_by"] == FILL


def test_where_it_is_not_known_what_rollouts_fill_all_that_is_left_goes() -> None:
    for made in (
        make(engine={"unbounded": "vLLM is given no max_num_seqs"}),
        make(from_config({**QWEN3_8B, "model_type": "afmoe"})),
    ):
        assert made.sized_by == LEFT and made.kv_blocks == made.left_blocks
        assert any(note.startswith("how much of a KV cache rollouts can fill is not known: ") for note in made.notes)
    asked = plan(EIGHT, Training(prompt=64), Engine(), H200, utilization=0.1)
    assert asked.sized_by == ASKED and asked.kv_tokens > 8 * 1024


def test_layers_of_two_kinds_need_more() -> None:
    """As vLLM groups them: groups of equally many layers, each with blocks of its own, one more where a window is."""
    engine = Engine(max_num_seqs=4, told_block_size=True)
    for full, windowed in ((10, 52), (4, 22), (12, 13), (1, 1), (8, 9), (3, 29)):
        kinds = ["full_attention"] * full + ["sliding_attention"] * windowed
        model = from_config(
            {**QWEN3_8B, "model_type": "gemma3_text", "num_hidden_layers": len(kinds), "layer_types": kinds,
             "sliding_window": 1024}
        )  # fmt: skip
        for share in (1.0, 1.25, 1.5):  # releases differ in when they take the larger number
            least, most = min(full, windowed), max(full, windowed)
            size = most if most < share * least else least
            per_sequence = -(-full // size) * 100 + -(-windowed // size) * 101  # pages of `size` layers
            pages = 4 * per_sequence + 1
            assert pages * size <= fill_blocks(model, engine, 1600) * len(kinds)
    alone = from_config({**QWEN3_8B, "model_type": "mistral", "sliding_window": 1024})
    assert fill_blocks(alone, engine, 1600) == 4 * 101 + 1
    assert fill_blocks(EIGHT, engine, 1600) == 4 * 100 + 1
    held = replace(engine, watermark=0.05)
    blocks = fill_blocks(EIGHT, held, 1600)
    assert blocks - int(0.05 * blocks) >= 401 > (blocks - 3) - int(0.05 * (blocks - 3))
    with pytest.raises(UsageError, match="watermark=1"):
        Engine(watermark=1)


@settings(max_examples=60, deadline=None)
@given(trainings, engines, st.integers(1, 4000), st.integers(MIB, 200 * GIB))
def test_no_sequence_lacks_a_block_by_the_cap(training: Training, engine: Engine, length: int, device: int) -> None:
    made = plan(SMALL, training, replace(engine, max_model_len=length), device)
    assert made.kv_blocks <= made.left_blocks
    if made.sized_by == FILL:
        assert made.kv_blocks >= made.needed_blocks and not any("queue" in w for w in made.warnings)
        for block in (16, 32, 64, 128, 256):  # whatever vLLM chooses
            own = made.kv_tokens // block
            assert own >= engine.max_num_seqs * -(-length // block) + 1


# ---- utilization -----------------------------------------------------------------------------------------------------


def test_the_utilization_gives_vllm_what_was_planned() -> None:
    made = make(rank=32)
    own = sum(made[name].bytes for name in ("engine buffers", "engine activations", "CUDA graphs"))
    given_by_vllm = made.gpu_memory_utilization * H200 - own  # Worker.determine_available_memory
    assert made.kv_left_bytes - H200 / 5000 <= given_by_vllm <= made.kv_left_bytes
    assert made.gpu_memory_utilization > make().gpu_memory_utilization  # full training leaves less
    counted = make(rank=32, engine={"counts_weights": True})
    assert counted.gpu_memory_utilization > made.gpu_memory_utilization


def test_a_utilization_that_cannot_be_honoured_is_told_with_both_numbers() -> None:
    training, engine = Training(batch=8, prompt=64), Engine()
    made = plan(EIGHT, training, engine, 80 * GIB, utilization=0.9)
    assert made.warnings and "gpu_memory_utilization=0.9 cannot be honoured" in made.warnings[0]
    assert f"set it to {made.gpu_memory_utilization:g}" in made.warnings[0]
    again = plan(EIGHT, training, engine, 80 * GIB, utilization=made.gpu_memory_utilization)
    assert not [w for w in again.warnings if "honoured" in w]


def test_a_lower_utilization_is_honoured() -> None:
    made = plan(EIGHT, Training(batch=8, prompt=64), Engine(), H200, utilization=0.1)
    assert made.refusal is None and not made.warnings
    assert made.kv_cache_memory_bytes < 0.1 * H200
    for wrong in (0, 1.1, -0.5, "much", float("nan")):
        with pytest.raises(UsageError, match="gpu_memory_utilization"):
            plan(EIGHT, Training(), Engine(), H200, utilization=wrong)  # type: ignore[arg-type]


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_refusals_name_the_term_the_size_and_the_remedy() -> None:
    assert "weights of 8b take 15.26 GiB" in str(make(device=12 * GIB).refusal)
    training = str(make(device=60 * GIB).refusal)
    assert "training needs" in training and "'optimizer state', 30.51 GiB" in training and "adamw_8bit" in training
    activations = str(make(rank=8, device=40 * GIB, checkpointing=False, completion=4096).refusal)
    assert "'saved activations'" in activations and "gradient_checkpointing=True" in activations
    logits = str(make(rank=8, device=60 * GIB, head="full", completion=4096).refusal)
    assert "'LM head and log-probabilities'" in logits
    assert make(rank=8, device=30 * GIB).refusal is None  # the engine takes the weights one by one
    little = Training(rank=1, batch=1, prompt=0, completion=1)
    loading = plan(EIGHT, little, Engine(max_num_seqs=1), 17 * GIB, margin=0)
    assert loading.training <= loading.available < loading.loading
    assert "loading the engine needs" in str(loading.refusal) and "the largest weight" in str(loading.refusal)
    long = str(make(rank=8, device=36 * GIB, engine={"max_model_len": 131072, "max_num_seqs": 256}).refusal)
    assert "KV cache of one sequence of 131072 tokens" in long and "missing" in long


def test_sequences_that_queue_are_told() -> None:
    made = make(rank=8, device=40 * GIB, completion=4000, engine={"max_num_seqs": 64})
    assert made.refusal is None
    assert any("queue or preempt" in w for w in made.warnings)


@pytest.mark.parametrize(
    "setting", [{"batch": 0}, {"rank": -1}, {"completion": 0}, {"dtype": "int3"}, {"head": "half"}]
)
def test_nonsense_is_named(setting: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(setting))):
        make(SMALL, **setting)


def test_every_family_has_a_plan() -> None:
    for family in FAMILIES:
        config = {
            **QWEN3_8B, "model_type": family, "n_embd": 4096, "n_head": 32, "num_experts": 8, "num_local_experts": 8,
            "num_experts_per_tok": 2, "moe_intermediate_size": 768,
        }  # fmt: skip
        made = make(from_config(config), device=2000 * GIB, rank=4)
        assert made.refusal is None and made.kv_blocks, family


def test_fp8_halves_a_block() -> None:
    assert 2 * kv_block_bytes(EIGHT, Engine(kv_dtype="fp8")) == kv_block_bytes(EIGHT, Engine())
