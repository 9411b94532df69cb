"""The promises, one by one, on a real engine: each of these was seen to fail with the code broken."""

from __future__ import annotations

import contextlib
import copy
import gc
import logging
from typing import Any

import pytest
import torch

import rlpatch
from rlpatch import phases
from rlpatch.demo import worker
from rlpatch.errors import SharingError, StandbyError, UsageError
from rlpatch.sharing.account import resident_twice

pytestmark = pytest.mark.cpu

PROMPTS = [[5, 9, 13], [7, 8, 9, 10], [20, 21]]


def pair_of(trainer: Any) -> phases.Colocation:
    pair = phases.of_engine(trainer.vllm_generation.llm)
    assert pair is not None and pair.engine is not None
    return pair


LONG = [[5 + (7 * i) % 50 for i in range(70)]]  # fills two blocks of the prefix cache


def generate(trainer: Any, prompts: list[list[int]] = PROMPTS) -> list[list[int]]:
    """Greedy completions through TRL's own path."""
    generation = trainer.vllm_generation
    generation.temperature = 0.0
    _, completions, _, _ = generation.generate(prompts=prompts, images=None, num_generations=1)
    return [list(ids) for ids in completions]


def reference(trainer: Any, prompts: list[list[int]] = PROMPTS) -> list[list[int]]:
    """The same, by the trainer's model alone."""
    completions = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            for _ in range(16):
                ids = torch.cat([ids, trainer.model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
                if ids[0, -1] == 2:
                    break
        completions.append(ids[0, len(prompt) :].tolist())
    return completions


def when_loaded(monkeypatch: pytest.MonkeyPatch, action: Any) -> None:
    """Call `action(model)` on every model that is loaded from a checkpoint."""
    from transformers import AutoModelForCausalLM

    original = AutoModelForCausalLM.from_pretrained.__func__

    def loaded(cls: Any, *args: Any, **kwargs: Any) -> Any:
        model = original(cls, *args, **kwargs)
        action(model)
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", classmethod(loaded))


def spans(tensors: Any) -> list[tuple[int, int]]:
    return [(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in (t.untyped_storage() for t in tensors)]


def step(trainer: Any, scale: float = 1.5) -> None:
    """A visible change of the policy, as an optimizer would make it: in place, through the trainer's parameters."""
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(scale)
                parameter.copy_(parameter.roll(1, 0))


# ---- 1: one copy -------------------------------------------------------------------------------------------------


def test_one_copy_and_no_address_moves(trainer_of: Any) -> None:
    trainer = trainer_of(steps=3)
    engine = pair_of(trainer).engine
    before = {name: p.data_ptr() for name, p in engine.model.named_parameters()}
    inside = spans(engine.model.parameters())
    for name, parameter in trainer.model.named_parameters():
        assert any(start <= parameter.data_ptr() < end for start, end in inside), name
    assert resident_twice(trainer.model, engine.model) == 0
    trainer.train()
    assert {name: p.data_ptr() for name, p in engine.model.named_parameters()} == before
    for name, parameter in trainer.model.named_parameters():
        assert any(start <= parameter.data_ptr() < end for start, end in inside), name


def test_the_trainers_tensors_look_independent(trainer_of: Any) -> None:
    """Storages of their own: nothing that groups tensors by storage may take q, k and v for tied."""
    trainer = trainer_of()
    storages = [p.untyped_storage() for p in trainer.model.parameters()]
    assert len({s.data_ptr() for s in storages}) == len(storages)
    for parameter, storage in zip(trainer.model.parameters(), storages, strict=True):
        assert storage.nbytes() == parameter.numel() * parameter.element_size()
    twin = copy.deepcopy(trainer.model)  # a reference model has memory of its own
    assert {p.data_ptr() for p in twin.parameters()}.isdisjoint({p.data_ptr() for p in trainer.model.parameters()})


# ---- 2: the policy is the trainer's --------------------------------------------------------------------------------


def test_rollouts_follow_the_trainer_without_any_push(trainer_of: Any) -> None:
    trainer = trainer_of()
    first = generate(trainer)
    step(trainer)
    trainer.vllm_generation.sync_weights()
    second = generate(trainer)
    assert second != first
    assert second == reference(trainer)


@pytest.mark.parametrize("standby", [True, False])
def test_cached_prefixes_are_forgotten(trainer_of: Any, standby: bool) -> None:
    """Cached keys and values describe memory that is gone (standby) and a policy that is not any more (every sync)."""
    trainer = trainer_of(apply={"standby": standby}, engine={"block_size": 32, "enable_prefix_caching": True})
    first = generate(trainer, LONG)
    assert first == reference(trainer, LONG)
    assert generate(trainer, LONG) == first
    step(trainer)
    trainer.vllm_generation.sync_weights()
    assert generate(trainer, LONG) == reference(trainer, LONG) != first


def test_engine_holds_the_trainers_policy_not_the_checkpoints(
    tiny_model: str, trainer_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer's model was changed after loading; the engine must be filled from memory, not from disk."""
    from transformers import AutoModelForCausalLM

    def change(model: Any) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.25)

    with monkeypatch.context() as patch:
        when_loaded(patch, change)
        trainer = trainer_of()
    on_disk = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).model.embed_tokens.weight
    engine = pair_of(trainer).engine.model.get_parameter("model.embed_tokens.weight")
    assert torch.equal(engine[: on_disk.shape[0]], on_disk + 0.25)


def test_moved_parameters_are_put_back_with_one_warning(trainer_of: Any, caplog: pytest.LogCaptureFixture) -> None:
    trainer = trainer_of()
    pair = pair_of(trainer)
    weight = trainer.model.model.layers[0].mlp.down_proj.weight
    address = weight.data_ptr()
    weight.data = weight.data.clone() * 2
    other = trainer.model.model.layers[1].mlp.down_proj
    other.weight = torch.nn.Parameter(other.weight.data.clone() * 3)
    with caplog.at_level(logging.WARNING, logger="rlpatch"):
        trainer.vllm_generation.sync_weights()
        trainer.vllm_generation.sync_weights()
    assert weight.data_ptr() == address
    assert resident_twice(trainer.model, pair.engine.model) == 0
    assert sum("moved out" in record.message for record in caplog.records) == 1
    assert torch.equal(pair.engine.model.get_parameter("model.layers.1.mlp.down_proj.weight"), other.weight)


def test_parameters_in_somebodys_flat_buffer_are_copied_not_taken_back(trainer_of: Any) -> None:
    """Optimizers that flatten parameters keep stepping their buffer; taking a tensor out of it would freeze it."""
    trainer = trainer_of()
    pair = pair_of(trainer)
    norm = trainer.model.model.norm.weight
    flat = torch.zeros(2 * norm.numel())
    flat[: norm.numel()] = norm.data
    norm.data = flat[: norm.numel()]
    for value in (7.0, 8.0):
        flat.fill_(value)
        trainer.vllm_generation.sync_weights()
        assert pair.engine.model.get_parameter("model.norm.weight").unique().tolist() == [value]
    assert norm.data_ptr() == flat.data_ptr()
    assert "model.norm.weight" in pair.sharing.report().copied


# ---- 3: frozen stays frozen ----------------------------------------------------------------------------------------


def test_frozen_parameters_stay_bit_identical(trainer_of: Any) -> None:
    trainer = trainer_of(steps=3)
    frozen = {}
    for name, parameter in trainer.model.named_parameters():
        if "embed" in name or "layers.0" in name:
            parameter.requires_grad_(False)
            frozen[name] = parameter.detach().clone()
    moving = trainer.model.lm_head.weight.detach().clone()
    trainer.train()
    for name, before in frozen.items():
        assert torch.equal(trainer.model.get_parameter(name), before), name
    assert not torch.equal(trainer.model.lm_head.weight, moving)


# ---- 4: standby loses nothing but the KV cache ---------------------------------------------------------------------


def test_same_tokens_after_standby_cycles(trainer_of: Any) -> None:
    trainer = trainer_of()
    pair = pair_of(trainer)
    weights = [p.data_ptr() for p in pair.engine.model.parameters()]
    first = generate(trainer)
    cycles = pair.standby.cycles
    for _ in range(4):
        assert pair.standby.released and pair.standby.mechanism.resident_bytes() == 0
        assert generate(trainer) == first
    assert pair.standby.cycles == cycles + 4
    assert [p.data_ptr() for p in pair.engine.model.parameters()] == weights
    rlpatch.revert()
    trainer.vllm_generation.sync_weights()
    assert generate(trainer) == first  # and the same without standby


def test_memory_really_goes_back(trainer_of: Any) -> None:
    size = 256 << 20
    trainer = trainer_of(engine={"kv_cache_memory_bytes": size})
    pair = pair_of(trainer)
    gc.collect()
    out = worker.resident_set()
    pair.standby.restore()
    within = worker.resident_set()
    pair.standby.release()
    again = worker.resident_set()
    assert within - out > 0.9 * size
    assert within - again > 0.9 * size


def test_out_of_turn_is_an_error_and_changes_nothing(trainer_of: Any) -> None:
    trainer = trainer_of()
    standby = pair_of(trainer).standby
    with pytest.raises(StandbyError, match="released already"):
        standby.release()
    standby.restore()
    with pytest.raises(StandbyError, match="not released"):
        standby.restore()
    standby.release()
    assert generate(trainer)


# ---- 5: explicit settings win --------------------------------------------------------------------------------------


def test_switched_off_means_off(trainer_of: Any) -> None:
    trainer = trainer_of(apply={"standby": False, "share_weights": False})
    pair = pair_of(trainer)
    assert pair.sharing is None and pair.standby is None
    assert resident_twice(trainer.model, pair.engine.model) > 0
    assert worker.kv_resident(pair.engine) > 0
    trainer.vllm_generation.sync_weights()
    assert generate(trainer)


def test_the_trainers_utilization_is_left_alone(trainer_of: Any) -> None:
    trainer = trainer_of(config={"vllm_gpu_memory_utilization": 0.23})
    assert trainer.vllm_generation.llm.llm_engine.vllm_config.cache_config.gpu_memory_utilization == 0.23


def test_other_engines_in_the_process_are_left_alone(trainer_of: Any, tiny_model: str) -> None:
    trainer_of()
    from vllm import LLM

    llm = LLM(tiny_model, dtype="float32", enforce_eager=True, kv_cache_memory_bytes=32 << 20, max_model_len=64)
    assert phases.of_engine(llm) is None
    assert llm.llm_engine.vllm_config.load_config.load_format == "auto"


# ---- sleep mode under sharing --------------------------------------------------------------------------------------


def test_trls_sleep_mode_becomes_standby(trainer_of: Any) -> None:
    trainer = trainer_of(config={"vllm_enable_sleep_mode": True}, steps=2)
    pair = pair_of(trainer)
    assert trainer.vllm_generation.enable_sleep_mode is False and pair.standby.released
    trainer.train()
    assert (
        max(row["sampling/sampling_logp_difference/mean"] for row in trainer.state.log_history if "loss" in row) < 2e-6
    )
    rlpatch.revert()


@pytest.mark.parametrize("level", [1, 2])
def test_no_sleep_level_reaches_shared_weights(trainer_of: Any, level: int) -> None:
    trainer = trainer_of()
    pair, llm = pair_of(trainer), trainer.vllm_generation.llm
    before = [p.detach().clone() for p in trainer.model.parameters()]
    llm.sleep(level=level)
    assert pair.standby.released
    llm.wake_up()
    assert not pair.standby.released
    llm.sleep(level)
    llm.wake_up(tags=["weights"])
    assert pair.standby.released
    llm.wake_up(tags=["kv_cache"])
    assert not pair.standby.released
    with pytest.raises(SharingError, match="sleep level"):
        llm.llm_engine.model_executor.sleep(level)
    with pytest.raises(SharingError, match="reload_weights"):
        llm.collective_rpc("reload_weights")
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    assert generate(trainer)


def test_without_standby_a_sharing_engine_refuses_to_sleep(trainer_of: Any) -> None:
    trainer = trainer_of(apply={"standby": False})
    assert pair_of(trainer).shares
    with pytest.raises(StandbyError, match="standby is off"):
        trainer.vllm_generation.llm.sleep(level=1)


# ---- 6: whatever goes wrong leaves the patched or the original state -----------------------------------------------


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_interrupted_rollout(trainer_of: Any, failure: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of()
    pair, llm = pair_of(trainer), trainer.vllm_generation.llm
    expected = generate(trainer)
    steps = 0
    original = type(llm.llm_engine).step

    def interrupted(self: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 3:
            raise failure("stop")
        return original(self)

    monkeypatch.setattr(type(llm.llm_engine), "step", interrupted)
    with pytest.raises(failure):
        generate(trainer)
    monkeypatch.undo()
    assert pair.standby.released and pair.standby.mechanism.resident_bytes() == 0
    assert not llm.llm_engine.has_unfinished_requests()
    assert generate(trainer) == expected


def test_failed_restore_names_the_remedy_and_spares_the_trainer(
    trainer_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of()
    pair = pair_of(trainer)
    expected = generate(trainer)
    before = [p.detach().clone() for p in trainer.model.parameters()]

    def no_memory() -> None:
        raise MemoryError("cannot allocate")

    monkeypatch.setattr(pair.standby.mechanism, "restore", no_memory)
    with pytest.raises(StandbyError, match="vllm_gpu_memory_utilization"):
        generate(trainer)
    monkeypatch.undo()
    assert pair.standby.released
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    assert generate(trainer) == expected


def test_engine_construction_failing_midway(trainer_of: Any, tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the weights were joined, before the KV cache exists: the trainer keeps its values, in memory of its own."""
    from transformers import AutoModelForCausalLM
    from vllm.v1.worker.cpu_worker import CPUWorker

    models: list[Any] = []
    when_loaded(monkeypatch, models.append)

    def fail(self: Any, *args: Any) -> None:
        raise RuntimeError("no memory for the KV cache")

    monkeypatch.setattr(CPUWorker, "determine_available_memory", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        trainer_of()
    monkeypatch.undo()
    reference = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    for mine, theirs in zip(models[0].parameters(), reference.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.untyped_storage().resizable()  # memory of its own, not a view of the dead engine's
    assert phases.building() is None and not [
        p for p in phases.live() if p.sharing is not None and not p.sharing.parted
    ]
    assert generate(trainer_of())  # the next attempt works


def test_model_without_a_path(trainer_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    when_loaded(monkeypatch, lambda model: setattr(model, "name_or_path", ""))
    with pytest.raises(UsageError, match="name_or_path"):
        trainer_of()


def test_revert_parts_a_live_trainer(trainer_of: Any) -> None:
    trainer = trainer_of()
    pair = pair_of(trainer)
    engine = pair.engine
    expected = generate(trainer)
    rlpatch.revert()
    assert resident_twice(trainer.model, engine.model) > 0
    assert worker.kv_resident(engine) > 0 and phases.live() == []
    assert generate(trainer) == expected
    step(trainer)
    assert generate(trainer) == expected  # the engine has a copy of its own now …
    trainer.vllm_generation.sync_weights()
    assert generate(trainer) != expected  # … which TRL's push updates


# ---- what cannot be shared -----------------------------------------------------------------------------------------


def test_another_dtype_falls_back_to_trls_push(trainer_of: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="rlpatch"):
        trainer = trainer_of(engine={"dtype": "bfloat16"}, steps=2)
    pair = pair_of(trainer)
    assert not pair.shares and "dtype" in pair.refusal
    assert sum("not shared" in record.message for record in caplog.records) == 1
    assert trainer.model.dtype == torch.float32
    trainer.train()
    assert pair.standby.cycles >= 3  # standby works all the same


def test_what_the_loader_reorders_is_copied(trainer_of: Any, tmp_path: Any) -> None:
    """vLLM reorders GPT-NeoX's fused QKV. (Plain TRL cannot push this model at all: its lm_head has another name.)"""
    from rlpatch.demo import tiny

    trainer = trainer_of(model=str(tiny.write_model(tmp_path, "gpt-neox")), steps=2)
    report = pair_of(trainer).sharing.report()
    assert report.shared and report.copied and set(report.copied.values()) == {"the engine's loader rearranges it"}
    assert all("query_key_value" in name for name in report.copied)
    trainer.train()
    assert (
        max(row["sampling/sampling_logp_difference/mean"] for row in trainer.state.log_history if "loss" in row) < 2e-6
    )


def test_weights_that_do_not_fit_twice(trainer_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a crowded device the engine's weights come into being one by one, out of what the trainer lets go of."""
    from rlpatch.adapters.vllm import _weights
    from rlpatch.sharing import late
    from rlpatch.sharing.share import Sharing

    first = trainer_of()
    expected = generate(first)
    monkeypatch.setattr(phases, "free_bytes", lambda device: 0)
    monkeypatch.setattr(late.LateMemory.__init__, "__defaults__", (1,))
    monkeypatch.setattr(late.Crowded.__init__, "__defaults__", (contextlib.nullcontext, 1))
    resident: list[int] = []
    freed: list[int] = []
    given_back: list[int] = []
    fill, original = Sharing.fill, late.Crowded.freed

    def watched(self: Any, model: Any, loader: Any) -> None:
        def load(weights: Any) -> Any:
            resident.append(sum(p.untyped_storage().nbytes() for p in model.parameters()))
            return loader(weights)

        fill(self, model, load)

    monkeypatch.setattr(Sharing, "fill", watched)
    monkeypatch.setattr(late.Crowded, "freed", lambda self, size: (freed.append(size), original(self, size))[1])
    monkeypatch.setattr(_weights, "give_back", lambda device: given_back.append(sum(freed)))
    trainer = trainer_of()
    pair = pair_of(trainer)
    assert given_back == [sum(freed)]  # once, when the trainer has let go of everything
    assert pair.shares and not pair.sharing.copied
    total = sum(p.untyped_storage().nbytes() for p in pair.engine.model.parameters())
    assert resident[0] < 0.05 * total and resident == sorted(resident)
    assert sum(freed) == pair.sharing.report().shared_bytes
    assert generate(trainer) == expected
    trainer.train()


def test_a_second_trainer_on_the_same_model(trainer_of: Any, tiny_model: str) -> None:
    """The later engine takes the weights over; the earlier one follows with copies. Both roll out the same policy."""
    first = trainer_of()
    one = generate(first)
    second = trainer_of()
    assert generate(second) == one
    assert len(phases.live()) >= 2


# ---- cost ----------------------------------------------------------------------------------------------------------


def test_sync_touches_nothing_when_all_is_shared(trainer_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No load_weights, no copy: what remains is a look at addresses and the prefix-cache reset."""
    trainer = trainer_of()
    pair = pair_of(trainer)
    calls: list[Any] = []
    monkeypatch.setattr(pair.sharing, "loader", lambda weights: calls.append(weights))
    trainer.vllm_generation.sync_weights()
    assert calls == [] and pair.sharing.sync() == 0


def test_status_tells_what_is_shared(trainer_of: Any) -> None:
    trainer = trainer_of()
    report = rlpatch.status()
    described = report.as_dict()["pairs"][-1]
    assert described["sharing"]["shared"] == len(list(trainer.model.parameters()))
    assert described["standby"]["released"] is True and described["standby"]["kv_bytes_resident"] == 0
    assert "pair:" in str(report)
