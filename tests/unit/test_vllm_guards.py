"""What stands between upstream's calls and shared weights, era by era; engines and pairs are stand-ins."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")

from rlpatch import phases
from rlpatch.adapters.vllm import _weights, engine_v0_9, weights_v0_9
from rlpatch.errors import SharingError
from rlpatch.lora.policy import SlotPolicy
from rlpatch.registry import Context


class Pair:
    """Stand-in for a `Colocation`: records what is asked of it."""

    def __init__(self, shares: bool = True, lora_request: Any = None) -> None:
        self.shares, self.lora_request, self.calls = shares, lora_request, []
        self.sharing = SimpleNamespace(engine_model="model")

    def __getattr__(self, name: str) -> Any:
        return lambda *args: self.calls.append(name)

    def rollout(self) -> Any:
        import contextlib

        return contextlib.nullcontext()


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``pair(**how)`` makes the pair that every engine, executor and worker belongs to."""

    def make(**how: Any) -> Pair:
        made = Pair(**how)
        for kind in ("of_engine", "of_executor", "of_worker"):
            monkeypatch.setattr(phases, kind, lambda owner: made)
        monkeypatch.setattr(phases, "live", lambda: [made])
        return made

    return make


def call(wrapper: Any, *args: Any, **kwargs: Any) -> list[Any]:
    """What reached upstream."""
    reached: list[Any] = []
    wrapper(lambda *a, **k: reached.append((a, k)), object(), args, kwargs)
    return reached


def sleep_of(lowest: int) -> Any:
    return {patch.path: patch.wrapper for patch in _weights.sleep_guards(lowest)}


@pytest.mark.parametrize(
    ("lowest", "level", "guarded"), [(0, 0, True), (0, 1, True), (0, 2, True), (1, 0, False), (1, 2, True)]
)
def test_sleep_becomes_standby_wherever_it_would_touch_shared_weights(
    pair: Any, lowest: int, level: int, guarded: bool
) -> None:
    mine = pair()
    assert bool(call(sleep_of(lowest)["LLM.sleep"], level=level)) is not guarded
    assert mine.calls == (["sleep"] if guarded else [])
    executor = sleep_of(lowest)["Executor.sleep"]
    if guarded:
        with pytest.raises(SharingError, match=f"sleep level {level} would take"):
            call(executor, level)
    else:
        assert call(executor, level)


def test_slots_are_registered_anew_after_a_sleep_that_discards_them(pair: Any) -> None:
    for level, forgotten in ((1, []), (2, ["forget_slots"])):
        mine = pair(shares=False)
        assert call(sleep_of(1)["LLM.sleep"], level) and mine.calls == forgotten


def test_upstreams_sleep_mode_never_stays_with_slots() -> None:
    mine = phases.Colocation(Context(), [], refusal="another precision", upstream_sleep=True)
    mine.engine = SimpleNamespace(sleep_mode=True)  # type: ignore[assignment]
    assert mine.upstream_sleep_stays
    mine.policy = SlotPolicy(lambda: None, None)  # type: ignore[arg-type, return-value]
    assert not mine.upstream_sleep_stays


@pytest.mark.parametrize("method", ["reload_weights", "load_model"])
def test_old_ways_to_reload_the_checkpoint_are_refused(pair: Any, method: str) -> None:
    pair()
    with pytest.raises(SharingError, match="overwrite the trainer's weights"):
        call(weights_v0_9._collective_rpc, method)
    assert call(weights_v0_9._collective_rpc, "get_model")
    pair(shares=False)
    assert call(weights_v0_9._collective_rpc, method)


def test_generate_gets_the_adapter_whatever_was_given_by_position(pair: Any) -> None:
    pair(lora_request="policy")
    wrappers = {patch.path: patch.wrapper for patch in engine_v0_9._patches(Context())}
    for path, positional in (("LLM.generate", 4), ("LLM.chat", 3)):
        ((_, kwargs),) = call(wrappers[path], *range(positional))
        assert kwargs == {"lora_request": "policy"}
        ((_, kwargs),) = call(wrappers[path], *range(positional + 1))  # the caller's own
        assert kwargs == {}
