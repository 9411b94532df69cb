"""Why no adapter gives each prompt once with ``n=num_generations``: vLLM's prefix cache computes it once as it is.

TRL gives every prompt ``num_generations`` times. vLLM splits ``n`` completions into as many requests, and either way all
but the first find the whole blocks of the prompt in the cache, in the very step that computes them.
"""

from __future__ import annotations

from typing import Any

import pytest

from rlpatch.demo import worker

pytestmark = [pytest.mark.cpu, pytest.mark.timeout(600)]

BLOCK, GENERATIONS = 32, 4
PROMPT = [3 + 7 * i % 60 for i in range(3 * BLOCK + 8)]


def test_a_prompt_s_blocks_are_computed_once(trainer_of: Any) -> None:
    from vllm import SamplingParams

    trainer = trainer_of(steps=1, engine={"block_size": BLOCK}, config={"vllm_max_model_length": 256})
    llm = worker.engine_of(trainer)
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    original, scheduled = scheduler.schedule, []

    def schedule(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        scheduled.append(found.total_num_scheduled_tokens)
        return found

    scheduler.schedule = schedule
    computed = {}
    for requests, completions in ((GENERATIONS, 1), (1, GENERATIONS)):
        scheduled.clear()  # and the prefix cache is, before each rollout of a pair
        llm.reset_prefix_cache()
        settings = SamplingParams(max_tokens=3, n=completions, ignore_eos=True)
        outputs = llm.generate([{"prompt_token_ids": PROMPT}] * requests, settings, use_tqdm=False)
        assert sum(len(output.outputs) for output in outputs) == GENERATIONS
        computed[requests] = [count for count in scheduled if count]
    assert computed[GENERATIONS] == computed[1]
    assert computed[1][0] == len(PROMPT) + (GENERATIONS - 1) * (len(PROMPT) % BLOCK)
