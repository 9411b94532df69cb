"""The adapters' contracts against a sample of real releases; ``tox -e contracts`` checks all of them.

Sources come from the package index once (about 150 MB) and from the cache afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from packaging.version import Version

from rlpatch import matrix, registry
from rlpatch.contracts import command
from rlpatch.contracts.check import Judgement, Verdict
from rlpatch.errors import SourceError

pytestmark = pytest.mark.network


def judgements(release: command.Release) -> dict[str, Judgement]:
    """capability -> what the release means for it; skips the test without network and cache."""
    try:
        command.tree(release)
    except SourceError as error:
        pytest.skip(f"no sources of {release} here: {error}")
    found = command.look(release)
    assert isinstance(found, dict), found
    return {judgement.capability: judgement for judgement in command.judge_all(release, found)}


def sample() -> Iterator[command.Release]:
    """The releases that CI runs, and the lowest and the highest that the matrix lists."""
    pairs = matrix.load().pairs
    for library in ("vllm", "trl"):
        known = sorted(Version(getattr(pair, library)) for pair in pairs)
        chosen = {known[0], known[-1], *(Version(getattr(pair, library)) for pair in matrix.load().ci)}
        for version in sorted(chosen):
            yield command.Release(library, version)


@pytest.mark.parametrize("release", list(sample()), ids=str)
def test_a_release_of_the_matrix_keeps_the_contracts(release: command.Release) -> None:
    found = judgements(release)
    assert found and not [each for each in found.values() if each.verdict.bad]


@pytest.mark.parametrize(
    "adapter",
    [adapter for library in ("peft", "transformers") for adapter in command.of_library(library)],
    ids=lambda adapter: adapter.name,
)
def test_the_newest_release_within_the_range_keeps_the_contracts(adapter: registry.Adapter) -> None:
    library = adapter.library
    try:
        inside = [r for r in command.every_release(library) if command.within(r.version, adapter.versions)]
    except SourceError as error:
        pytest.skip(f"the releases of {library} are unknown here: {error}")
    for release in (inside[0], inside[-1]):
        assert judgements(release)[adapter.capability].verdict is Verdict.COVERED


@pytest.mark.parametrize(
    ("release", "name", "why"),
    [
        # level 0 would discard everything there: pause_scheduler exists already, sleep does not use it
        ("vllm==0.16.0", "vllm/standby_v0_17", "the code of vllm.v1.engine.core:EngineCore.sleep is new"),
        ("vllm==0.28.0", "vllm/bitsandbytes_v0_9", "there is no module vllm.model_executor.model_loader.bitsandbytes"),
        ("vllm==0.28.0", "vllm/standby_v0_31", "there is no vllm.v1.engine.llm_engine:LLMEngine.release_kv_cache"),
        ("trl==1.8.0", "trl/generation_v1_10", "the code of trl.generation.vllm_generation:VLLMGeneration._init_vllm"),
    ],
)
def test_releases_outside_of_a_range_are_told_apart(release: str, name: str, why: str) -> None:
    wanted = command.requirement(release)
    judgements(wanted)
    found = command.look(wanted)
    assert isinstance(found, dict)
    assert name in {adapter.name for adapter in registry.adapters()}
    assert any(reason.startswith(why) for _, reason in found[name]), found[name]
