"""Leaving vLLM's memory pool for a moment. torch's calls are recorded (there is no GPU); tests/gpu/test_crowded_gpu.py is
about what they do."""

from __future__ import annotations

import types
from typing import Any

import pytest

torch = pytest.importorskip("torch")
cumem = pytest.importorskip("vllm.device_allocator.cumem")

from rlpatch.adapters.vllm._weights import give_back, outside_the_pool  # noqa: E402

POOL = types.SimpleNamespace(id=(0, 7))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    found: list[Any] = []
    for name in ("beginAllocateCurrentThreadToPool", "endAllocateToPool", "releasePool"):
        monkeypatch.setattr(
            torch.cuda.memory, f"_cuda_{name}", lambda *a, name=name: found.append((name, *a)), raising=False
        )
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return found


def allocator(monkeypatch: pytest.MonkeyPatch, tag: str, pools: Any) -> None:
    fake = types.SimpleNamespace(current_tag=tag, allocator_and_pools=pools)
    monkeypatch.setattr(cumem.CuMemAllocator, "instance", fake)


@pytest.mark.parametrize("entered", [(POOL, None), [(None, None), (POOL, None)]], ids=["one", "the last of several"])
def test_out_and_in_again(calls: list[Any], monkeypatch: pytest.MonkeyPatch, entered: Any) -> None:
    allocator(monkeypatch, "weights", {"weights": entered})
    with pytest.raises(KeyError), outside_the_pool():
        calls.append("there")
        raise KeyError
    assert calls == [
        ("endAllocateToPool", 0, POOL.id), "there",
        ("beginAllocateCurrentThreadToPool", 0, POOL.id), ("releasePool", 0, POOL.id),
    ]  # fmt: skip


def test_nothing_to_leave(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with outside_the_pool():  # no engine has a pool
        pass
    allocator(monkeypatch, "default", {"weights": (POOL, None)})  # an earlier engine's
    with outside_the_pool():
        pass
    assert calls == []
    allocator(monkeypatch, "weights", {"weights": (POOL, None)})
    for name in ("endAllocateToPool", "endAllocateCurrentStreamToPool"):
        monkeypatch.setattr(torch.cuda.memory, f"_cuda_{name}", None, raising=False)
    with outside_the_pool():  # a torch that calls it otherwise
        pass
    assert calls == []


def test_what_the_trainer_let_go_of_is_given_back_outside(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    allocator(monkeypatch, "weights", {"weights": (POOL, None)})
    device = types.SimpleNamespace(empty_cache=lambda: calls.append("empty"))
    monkeypatch.setattr(torch, "get_device_module", lambda which: device)
    give_back(torch.device("cpu"))  # has no such cache
    assert calls == []
    give_back(torch.device("cuda", 0))
    assert [call if isinstance(call, str) else call[0] for call in calls] == [
        "endAllocateToPool", "empty", "beginAllocateCurrentThreadToPool", "releasePool",
    ]  # fmt: skip
