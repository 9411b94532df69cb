"""What the plan decides for an engine about to be built; trainers, models and the device's size are stand-ins."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from rlpatch import settings
from rlpatch.errors import UsageError
from rlpatch.memory.budget import Budget, Decision, Release, Room, decide
from rlpatch.memory.planning import LEFT
from rlpatch.memory.sizes import GIB, MIB

QWEN3_8B: dict[str, Any] = dict(
    model_type="qwen3", hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, vocab_size=151936, max_position_embeddings=40960, dtype="bfloat16",
)  # fmt: skip
# what TRL hands to ``vllm.LLM``
ARGUMENTS: dict[str, Any] = dict(
    model="8b", tensor_parallel_size=1, gpu_memory_utilization=0.3, max_model_len=None, max_num_seqs=8,
    max_num_batched_tokens=4096, model_impl="vllm",
)  # fmt: skip


class Weight:
    """A parameter without memory."""

    def __init__(self, shape: tuple[int, ...], dtype: str = "bfloat16") -> None:
        self.shape, self.dtype, self.requires_grad = shape, f"torch.{dtype}", True

    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    def is_floating_point(self) -> bool:
        return True


class Model:
    """A transformers model, as far as the description reads one."""

    def __init__(self, dtype: str = "bfloat16", **config: Any) -> None:
        fields = {**QWEN3_8B, **config}
        self.config = SimpleNamespace(to_dict=lambda: fields, _name_or_path="8b", **fields)
        self.weight = Weight((8_190_735_360,), dtype)

    def named_parameters(self) -> Any:
        return [("weight", self.weight)]

    def parameters(self) -> Any:
        return [weight for _, weight in self.named_parameters()]


class Adapted(Model):
    """The same with a LoRA."""

    def __init__(self) -> None:
        super().__init__()
        self.peft_config = {"default": SimpleNamespace(r=8, target_modules=None)}
        self.weight.requires_grad = False

    def named_parameters(self) -> Any:
        return [("weight", self.weight), ("layer.lora_A.weight", Weight((8, 4096)))]


def budget(left_alone: bool = True, model: Any = None, **args: Any) -> Budget:
    fields = {"optim": "adamw_8bit", "max_completion_length": 256, "bf16": True, "per_device_train_batch_size": 8}
    model = model or Model()
    return Budget(SimpleNamespace(args=SimpleNamespace(**{**fields, **args}), model=model), model, left_alone)


def decided(
    own: Budget | None = None, room: Room | None = None, release: Release | None = None, **arguments: Any
) -> Decision:
    return decide(own or budget(), {**ARGUMENTS, **arguments}, room or Room(141 * GIB), release or Release())


def test_the_plan_sizes_the_cache() -> None:
    made = decided()
    assert made.applied and made.plan is not None and not made.warnings
    assert made.arguments["kv_cache_memory_bytes"] == made.plan.kv_cache_memory_bytes < made.plan.kv_left_bytes
    assert made.plan.kv_tokens == 8 * 40960 + 256  # 8 sequences as long as the model's positions
    # vLLM refuses to start where its share of the device is not free: the weights are there already
    assert made.arguments["gpu_memory_utilization"] * 141 * GIB <= 141 * GIB - 16_381_470_720
    assert made.as_dict()["generating"] + made.as_dict()["kv_cache_memory_bytes"] <= 141 * GIB
    assert "of KV cache" in str(made) and "was left alone" in str(made)
    assert "all that rollouts can fill of the " in str(made) and " that are left" in str(made)


def test_the_cache_is_no_larger_than_its_rollouts() -> None:
    def tokens(**arguments: Any) -> int:
        made = decided(**arguments).plan
        assert made is not None
        return made.kv_tokens

    assert tokens(max_model_len=1000) == 8 * 1024 + 256
    assert tokens(max_model_len=1000, block_size=16) == (8 * 63 + 1) * 16
    assert tokens(max_model_len=1000, max_num_seqs=64) == 64 * 1024 + 256
    whole = decided(max_model_len=1000, max_num_seqs=None)
    assert whole.plan is not None and whole.plan.sized_by == LEFT
    assert "), all that is left; beside" in str(whole)
    assert (
        whole.as_dict()["kv_sized_by"] == LEFT and whole.as_dict()["kv_left_bytes"] == whole.plan.kv_cache_memory_bytes
    )
    for plan in (
        decided(max_model_len=1000, speculative_config={"method": "ngram"}).plan,
        decided(max_model_len=1000, kv_transfer_config={"kv_connector": "NixlConnector"}).plan,
        decided(max_model_len=1000, release=Release(takes_bytes=False)).plan,
    ):
        assert plan is not None and plan.sized_by == LEFT
    stretched = decided(budget(model=Model(rope_parameters={"full": {"rope_type": "yarn", "factor": 2.0}}))).plan
    assert stretched is not None and stretched.kv_tokens == 8 * 2 * 40960 + 256


def test_releases_without_bytes_get_the_share_alone() -> None:
    made = decided(release=Release(takes_bytes=False))
    assert set(made.arguments) == {"gpu_memory_utilization"} and made.arguments["gpu_memory_utilization"] != 0.3


@pytest.mark.parametrize("name", ["kv_cache_memory_bytes", "num_gpu_blocks_override"])
def test_a_cache_sized_otherwise_stays(name: str) -> None:
    made = decided(**{name: 4096})
    assert not made.applied and not made.arguments and f"{name}=4096" in made.reason
    assert "VLLM_CPU_KVCACHE_SPACE=4" in decided(release=Release(sized_by="VLLM_CPU_KVCACHE_SPACE=4")).reason


def test_a_given_utilization_wins() -> None:
    made = decided(budget(False), gpu_memory_utilization=0.25)
    assert not made.applied and not made.arguments and not made.warnings and "0.25 was given" in made.reason


def test_a_given_utilization_that_contradicts_is_told_once_with_both_numbers() -> None:
    made = decided(budget(False), gpu_memory_utilization=0.9)
    assert not made.arguments
    (warning,) = made.warnings
    assert (
        "gpu_memory_utilization=0.9" in warning
        and "asks for a KV cache of" in warning
        and " fit. Leave it unset" in warning
    )


def test_a_given_utilization_is_no_error_where_the_plan_does_not_fit() -> None:
    made = decided(budget(False), Room(20 * GIB), gpu_memory_utilization=0.3)
    assert not made.arguments and any("were given" in w or "was given; by the plan" in w for w in made.warnings)


def test_what_does_not_fit_is_an_error_that_names_the_term() -> None:
    with pytest.raises(UsageError) as caught:
        decided(room=Room(40 * GIB))
    text = str(caught.value)
    assert (
        "training needs" in text and "more than the 40.00 GiB" in text and "The largest that can be changed is" in text
    )
    assert "try " in text and "memory_plan=False" in text and "vllm_gpu_memory_utilization" in text


def test_what_is_too_large_by_estimate_alone_is_a_warning() -> None:
    """A LoRA without checkpointing: what 8 sequences of 4,352 tokens save for the backward pass is an estimate."""
    lora = budget(model=Adapted(), max_completion_length=4096, gradient_checkpointing=False)
    made = decided(lora, Room(60 * GIB))
    assert made.applied and made.plan is not None and made.plan.training > made.plan.available
    (warning,) = [text for text in made.warnings if "training needs" in text]
    assert warning.startswith("memory plan: by estimate training needs")
    with pytest.raises(UsageError, match="weights of 8b take"):
        decided(lora, Room(12 * GIB))


def test_a_plan_that_fails_keeps_no_engine_from_being_built(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("torch")
    from rlpatch.phases import Colocation

    def broken(*_: Any) -> Decision:
        raise RuntimeError("no driver")

    pair: Any = SimpleNamespace(_decide=broken, memory=None)
    assert not Colocation.plan_memory(pair, ARGUMENTS, Release())
    assert not pair.memory.applied and "no driver" in pair.memory.reason
    assert "not applied: it failed: RuntimeError('no driver')" in caplog.text


def test_others_and_a_limit_are_left_out() -> None:
    rooms = (Room(141 * GIB), Room(141 * GIB, taken=30 * GIB), Room(141 * GIB, taken=10 * GIB, limit=111 * GIB))
    whole, taken, limited = (decided(room=room, max_num_seqs=64).arguments["kv_cache_memory_bytes"] for room in rooms)
    assert taken == limited and abs(whole - taken - 30 * GIB) < 4 * MIB
    assert Room(10, limit=20).others == 0
    with pytest.raises(UsageError, match=r"20.00 GiB of the device's 141.00 GiB count; the limit"):
        decided(room=Room(141 * GIB, taken=10 * GIB, limit=20 * GIB))
    with pytest.raises(UsageError, match="others take the rest"):
        decided(room=Room(141 * GIB, taken=121 * GIB))


def test_an_unknown_architecture_is_one_warning() -> None:
    made = decided(budget(model=Model(kv_lora_rank=512)))
    assert not made.applied and not made.arguments and made.plan is None
    (warning,) = made.warnings
    assert "no plan can be made" in warning and "vllm_gpu_memory_utilization=0.3 stays" in warning
    assert not decided(budget(False, model=Model(kv_lora_rank=512))).warnings


def test_weights_of_two_dtypes_are_not_shared() -> None:
    made = decided(budget(model=Model("float32"), bf16=False))
    assert not made.applied and not made.arguments and "different dtypes" in made.reason


def test_the_engine_s_longest_sequence_fits_its_cache() -> None:
    """vLLM takes the model's where TRL gives none, and does not start when the KV cache cannot hold it."""
    made = decided(budget(model=Adapted(), per_device_train_batch_size=2), Room(22 * GIB), max_num_seqs=2)
    assert made.applied and made.plan is not None and made.plan.kv_tokens < 40960
    length = made.arguments["max_model_len"]
    assert 0 < length < made.plan.kv_tokens and f"max_model_len={length}" in made.reason
    assert "max_model_len" not in decided().arguments
    stretched = Model(rope_scaling={"rope_type": "yarn", "factor": 40.0})
    assert decided(budget(model=stretched)).arguments["max_model_len"] == 40960


def test_what_the_engine_is_built_with_counts() -> None:
    plain = decided(max_model_len=2048).plan
    assert plain is not None
    eager = decided(max_model_len=2048, enforce_eager=True).plan
    slots = decided(max_model_len=2048, enable_lora=True, max_loras=1, max_lora_rank=64).plan
    fp8 = decided(max_model_len=2048, kv_cache_dtype="fp8").plan
    assert eager is not None and slots is not None and fp8 is not None
    assert eager.kv_left_bytes > plain.kv_left_bytes > slots.kv_left_bytes
    assert fp8.block_bytes * 2 == plain.block_bytes
    assert not any(term.name == "CUDA graphs" for term in eager.terms)


def test_a_reference_model_and_an_optimizer_that_are_there_count_as_they_are() -> None:
    own = budget(beta=0.04)
    own.trainer.ref_model = Model("float32")
    made = decided(own, Room(200 * GIB)).plan
    assert made is not None and made["reference model"].bytes == 4 * 8_190_735_360
    own = budget()
    own.trainer.optimizer = object()
    made = decided(own, Room(200 * GIB)).plan
    assert made is not None and made["optimizer state"].bytes == 8 * 8_190_735_360
    assert "the trainer was given an optimizer of its own" in made.notes


# ---- the setting -----------------------------------------------------------------------------------------------------

RESOLVE: dict[str, Any] = dict(
    standby=None, share_weights=None, defaults=None, lora=None, include=None, exclude=None, strict=None,
    known=("memory_plan",),
)  # fmt: skip


@pytest.mark.parametrize(
    ("value", "found"),
    [(None, True), (True, True), (False, False), ("40GiB", 40 * GIB), (1 << 30, GIB), ("8 GB", 8 * 10**9)],
)
def test_the_setting(value: Any, found: Any) -> None:
    resolved = settings.resolve(**RESOLVE, memory_plan=value)
    assert resolved.memory_plan == found and type(resolved.memory_plan) is type(found)
    assert resolved.wants("memory_plan") is bool(found)


@pytest.mark.parametrize(
    ("text", "found"), [("0", False), ("off", False), ("1", True), ("", True), ("40GiB", 40 * GIB)]
)
def test_the_variable(text: str, found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLPATCH_MEMORY_PLAN", text)
    assert settings.resolve(**RESOLVE).memory_plan == found
    assert settings.resolve(**RESOLVE, memory_plan=False).memory_plan is False


@pytest.mark.parametrize("value", ["much", "0GiB", 1.5, -3])
def test_an_unusable_size_is_named(value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"apply\(memory_plan=…\)"):
        settings.resolve(**RESOLVE, memory_plan=value)
    if not isinstance(value, float):  # of a byte
        monkeypatch.setenv("RLPATCH_MEMORY_PLAN", str(value))
        with pytest.raises(UsageError, match="RLPATCH_MEMORY_PLAN"):
            settings.resolve(**RESOLVE)


def parking(
    mode: bool | str, host: int = 100 * GIB, total: int = 80 * GIB, left_alone: bool = True, **args: Any
) -> Decision:
    long = {"per_device_train_batch_size": 2, "max_completion_length": 34_000, "gradient_checkpointing": True, **args}
    return decided(replace(budget(left_alone, **long), parking=mode), Room(total, host=host), max_num_seqs=2)


def test_the_optimizer_s_state_is_parked_where_the_plan_does_not_fit_otherwise() -> None:
    without, auto, always = parking(False), parking("auto"), parking(True)
    assert any("by estimate training needs" in warning for warning in without.warnings) and not without.parked
    assert auto.parked and always.parked and auto.plan == always.plan
    assert auto.plan is not None and without.plan is not None and auto.plan.refusal is None
    assert auto.plan.kv_left_bytes > without.plan.kv_left_bytes + 14 * GIB
    assert "the optimizer's state waits in host memory between steps, because it would not fit otherwise" in auto.reason
    assert "waits" not in always.reason
    assert auto.as_dict()["parked"] is True

    short = parking("auto", max_completion_length=256)
    assert not short.parked and short.plan == parking(False, max_completion_length=256).plan
    assert not parking("auto", host=20 * GIB).parked  # nor does the host have room for it
    given = parking("auto", left_alone=False)
    assert given.parked and not given.applied  # the utilization is the script's, the training is the same
    small = parking("auto", total=40 * GIB)
    assert small.parked and small.plan is not None and small.plan.refusal is not None  # nearer, at least


def test_the_plan_is_told_whether_adapters_cast() -> None:
    own = budget(model=Adapted(), gradient_checkpointing=True)
    made, bare = (decided(replace(own, input_casts=casts)).plan for casts in (True, False))
    assert made is not None and bare is not None and bare.training < made.training
    full = budget()
    assert decided(replace(full, input_casts=False)).plan == decided(full).plan


def test_segments_are_expanded_where_the_plan_does_not_fit_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    def expanding(expand: bool | str, length: int, park: bool | str = False, left_alone: bool = True) -> Decision:
        long = {"per_device_train_batch_size": 2, "max_completion_length": length, "gradient_checkpointing": True}
        made = replace(budget(left_alone, **long), expanding=expand, parking=park)
        return decided(made, Room(80 * GIB, host=100 * GIB), max_num_seqs=2)

    def longest(expand: bool) -> int:
        found = expanding(expand, 4096)
        assert found.plan is not None
        return found.plan.training_context - 1024

    length = (longest(False) + longest(True)) // 2
    without, auto, always = expanding(False, length), expanding("auto", length), expanding(True, length)
    assert without.warnings and not without.expanded
    assert auto.expanded and auto.plan == always.plan and auto.plan is not None and auto.plan.refusal is None
    assert "expands its segments, because it would not fit otherwise" in auto.reason
    assert "expands" not in always.reason and auto.as_dict()["expanded"] is True
    assert not expanding("auto", 256).expanded
    given = expanding("auto", length, left_alone=False)
    assert given.expanded and not given.applied  # the utilization is the script's, the training is the same

    # where it would fit only just, too, and what costs more is not done for that
    barely, easily = longest(False) - 64, (longest(False) * 9) // 10
    plans = {length: expanding(False, length).plan for length in (barely, easily)}
    assert all(one is not None and one.refusal is None for one in plans.values())
    for park in (False, "auto"):
        assert expanding("auto", barely, park=park).expanded and not expanding("auto", barely, park=park).parked
        assert not expanding("auto", easily, park=park).expanded
    assert expanding(False, barely, park="auto").plan == plans[barely]
    edge = expanding("auto", longest(True) - 64, park="auto")  # expanded, and only just even so
    assert edge.expanded and not edge.parked

    # of what may be done, what costs least; both where one alone is not enough
    assert not expanding("auto", length, park="auto").parked
    parked = expanding("auto", longest(True) + 2048, park="auto")
    assert parked.parked and not parked.expanded

    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    assert expanding(False, length).plan == always.plan  # as the environment says


def saving(
    wanted: bool = True, total: int = 141 * GIB, left_alone: bool = True, model: Any = None, **args: Any
) -> Decision:
    own = budget(left_alone, model, **{"gradient_checkpointing": True, **args})
    return decided(replace(own, saving=wanted), Room(total))


def test_activations_are_saved_where_the_plan_has_room_for_them() -> None:
    made, without = saving(), saving(False)
    assert made.saving is not None and without.saving is None and made.plan == without.plan
    assert made.arguments == without.arguments  # the KV cache comes first
    assert made.plan is not None and made.saving.training > made.plan.training
    assert "no layer is recomputed (gradient_checkpointing was left alone)" in str(made)
    assert made.as_dict()["saving_context"] == made.saving.training_context > 768
    assert "recomputed" not in str(without) and without.as_dict()["saving_context"] == 0

    context = made.saving.training_context
    assert made.saves(8, context) and made.saves(1, 100)
    assert not (made.saves(8, context + 1) or made.saves(9, 100) or without.saves(1, 100))
    # a twentieth of the device stays free
    least = saving(max_completion_length=context - 512)
    assert least.saving is not None and least.saving.refusal is None
    assert 0 <= 141 * GIB - least.saving.training < 2 * GIB and least.saving["margin"].bytes > 7 * GIB


def test_activations_are_saved_however_the_cache_is_sized() -> None:
    given = saving(left_alone=False)
    assert given.saving is not None and not given.applied
    adapted = saving(model=Adapted())
    assert adapted.saving is not None


def test_activations_give_way() -> None:
    """To a KV cache that could not come back beside what such passes leave in torch's allocator, and to what is refused."""
    small = saving(total=60 * GIB)
    assert small.plan is not None and small.plan.refusal is None and small.plan.sized_by == "all that is left"
    assert small.saving is None
    assert saving(total=36 * GIB, left_alone=False).saving is None  # even with checkpoints training does not fit
