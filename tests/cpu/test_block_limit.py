"""A KV cache that came back in part: vLLM schedules with the blocks that are there, and with no other.

All of its memory is there in truth: the device that had no room for it is played by what the mechanism says.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest

import rlpatch
from rlpatch import phases
from rlpatch.demo import worker
from rlpatch.errors import StandbyError

pytestmark = [pytest.mark.cpu, pytest.mark.timeout(600)]

BLOCK, TOTAL, PART = 32, 64, 8  # tokens, blocks, blocks
PROMPTS = [[3 + i, 9, 14 + i, 22, 31] for i in range(6)]


class Crowded:
    """A mechanism that says how many blocks are backed."""

    def __init__(self, mechanism: Any) -> None:
        self.mechanism = mechanism
        self.backed: int | None = None

    def restore(self) -> int | None:
        self.mechanism.restore()
        return self.backed

    def __getattr__(self, name: str) -> Any:
        return getattr(self.mechanism, name)


class Rig:
    """A trainer's engine, the mechanism around its KV cache, and every block id that reaches its worker."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.llm = worker.engine_of(trainer)
        (self.pair,) = phases.live()
        assert self.pair.standby is not None and self.pair.engine is not None
        self.standby = self.pair.standby
        self.crowded = Crowded(self.standby.mechanism)
        self.standby.mechanism = self.crowded  # type: ignore[assignment]
        self.ids: set[int] = set()
        runner, original = self.pair.engine.runner, self.pair.engine.runner.execute_model

        def execute_model(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
            for request in scheduled.scheduled_new_reqs:
                self.ids.update(block for group in request.block_ids for block in group)
            for groups in scheduled.scheduled_cached_reqs.new_block_ids:
                self.ids.update(block for group in groups or () for block in group)
            return original(scheduled, *args, **kwargs)

        runner.execute_model = execute_model

    def tokens(self, length: int = 40, prompts: list[list[int]] = PROMPTS) -> list[list[int]]:
        from vllm import SamplingParams

        self.ids.clear()
        outputs = self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            SamplingParams(temperature=0, max_tokens=length, ignore_eos=True),
            use_tqdm=False,
        )
        return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture(scope="module")
def rig(tiny_model: str) -> Iterator[Rig]:
    rlpatch.apply()
    engine = {"kv_cache_memory_bytes": None, "num_gpu_blocks_override": TOTAL, "block_size": BLOCK}
    config = {"vllm_max_model_length": 256}
    yield Rig(worker.make_trainer(worker.Job(tiny_model, True, steps=1, engine=engine, config=config)))
    rlpatch.revert()


def test_fewer_blocks_give_the_same_tokens(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    rig.crowded.backed = None
    whole = rig.tokens()
    assert max(rig.ids) >= PART and max(rig.ids) < TOTAL
    rig.crowded.backed = PART
    with caplog.at_level(logging.WARNING, "rlpatch"):
        assert rig.tokens() == whole and rig.tokens() == whole
    assert rig.ids and max(rig.ids) < PART  # no block that is not backed, ever
    (text,) = [record.getMessage() for record in caplog.records if "blocks" in record.getMessage()]
    assert f"came back with {PART} of {TOTAL} blocks" in text  # once, not at each rollout
    (pair,) = rlpatch.status().pairs
    assert pair["standby"]["kv_blocks"] == {"usable": PART, "total": TOTAL}
    rig.crowded.backed = PART // 2  # fewer still
    assert rig.tokens() == whole and max(rig.ids) < PART // 2
    rig.crowded.backed = None  # the next good restore lifts the limit
    assert rig.tokens() == whole and max(rig.ids) >= PART
    assert rig.standby.blocks is not None and rig.standby.blocks.usable == TOTAL


def test_cached_prefixes_stay_within_the_limit(rig: Rig) -> None:
    prompts = [[5, *range(3, 40), i] for i in range(4)]  # a block in common
    rig.crowded.backed = None
    whole = rig.tokens(20, prompts)
    rig.crowded.backed = PART
    assert rig.tokens(20, prompts) == whole and max(rig.ids) < PART
    rig.crowded.backed = None


def test_a_request_that_can_never_fit_is_refused(rig: Rig) -> None:
    """vLLM would wait for blocks for ever."""
    rig.crowded.backed = PART // 2
    with pytest.raises(StandbyError, match=r"up to 105 tokens needs 4 KV blocks, and 3 of 63 came back") as caught:
        rig.tokens(100)
    assert "intact" in str(caught.value) and rig.standby.released
    assert len(rig.tokens(16)[0]) == 16  # and the next one is served
    rig.crowded.backed = None
    assert len(rig.tokens(100, PROMPTS[:1])[0]) == 100


def test_too_few_to_serve_anything(rig: Rig) -> None:
    rig.crowded.backed = 1
    with pytest.raises(StandbyError, match=f"1 of {TOTAL} KV blocks cannot serve a request"):
        rig.tokens(4)
    assert rig.standby.released
    rig.crowded.backed = None
    assert len(rig.tokens(4)) == len(PROMPTS)


def test_training_goes_on_with_fewer(rig: Rig) -> None:
    rig.crowded.backed = 4
    rig.ids.clear()
    rig.trainer.train()
    (row,) = [row for row in rig.trainer.state.log_history if "loss" in row]
    assert row["sampling/sampling_logp_difference/mean"] < 2e-6 and 0 < max(rig.ids) < 4


def test_parting_gives_all_blocks_back(rig: Rig) -> None:
    rig.crowded.backed = PART
    rig.tokens(4)
    rig.crowded.backed = None
    rlpatch.revert()
    assert rig.standby.blocks is not None and rig.standby.blocks.usable == TOTAL
