"""The standby of releases that cannot pause, tried on a real engine of a release that can: it needs no less of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

pytest.importorskip("vllm")
pytest.importorskip("torch")

from rlpatch import phases
from rlpatch.adapters.vllm.standby_v0_9 import RestingStandby, _patches
from rlpatch.engine import Engine
from rlpatch.errors import StandbyError
from rlpatch.patching import PatchSet
from rlpatch.registry import Context
from rlpatch.standby import KVStandby

pytestmark = [pytest.mark.cpu, pytest.mark.timeout(600)]

PROMPTS = [[5, 9, 14, 22], [7, 7, 31]]


@pytest.fixture(scope="module")
def engine(tiny_model: str) -> Engine:
    from vllm import LLM

    return Engine(
        LLM(tiny_model, dtype="float32", enforce_eager=True, kv_cache_memory_bytes=16 << 20, max_model_len=96,
            enable_prefix_caching=True)
    )  # fmt: skip


def tokens(engine: Engine) -> list[list[int]]:
    from vllm import SamplingParams

    prompts: Any = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    outputs = engine.llm.generate(
        prompts, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True), use_tqdm=False
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_cycles_of_an_engine_at_rest_change_no_token(engine: Engine) -> None:
    before = tokens(engine)
    standby = KVStandby(engine, RestingStandby(engine))
    whole = standby.mechanism.resident_bytes()
    assert whole > 0
    for _ in range(3):
        standby.release()
        assert standby.mechanism.resident_bytes() == 0
        standby.restore()
        assert standby.mechanism.resident_bytes() == whole
        assert tokens(engine) == before


@pytest.fixture
def guarded(engine: Engine) -> Iterator[KVStandby]:
    """A pair around the engine, and the guard on its front end."""
    pair = phases.Colocation(Context(), [])
    pair.engine = engine
    pair.standby = KVStandby(engine, RestingStandby(engine))
    phases._live.add(pair)
    patches = PatchSet("guard", _patches(Context()))
    patches.apply()
    yield pair.standby
    assert patches.revert() == []
    phases._live.discard(pair)


def test_no_step_runs_while_the_cache_is_out(engine: Engine, guarded: KVStandby) -> None:
    before = tokens(engine)
    guarded.release()
    with pytest.raises(StandbyError, match="restore"):
        tokens(engine)
    assert engine.abort_requests() == len(PROMPTS)
    guarded.restore()
    engine.drain()
    assert tokens(engine) == before
