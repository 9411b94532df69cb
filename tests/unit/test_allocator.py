"""Which options of torch's allocator are put in force, and what is left of them. A CUDA build's setter is played."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from rlpatch import allocator  # noqa: E402

CONF = allocator.CONF


class Played:
    """torch's setter of options: all at once, what is not named is forgotten."""

    def __init__(self) -> None:
        self.options = ""
        self.offered = True

    def set(self, options: str) -> None:
        self.options = options

    def snapshot(self) -> dict[str, Any]:
        return {
            "allocator_settings": {"expandable_segments": self.offered and "expandable_segments:True" in self.options}
        }


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Iterator[Played]:
    found = Played()
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", found.set, raising=False)
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", found.snapshot)
    for variable in (*allocator.VARIABLES, "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    yield found
    allocator.collapse()


def test_they_are_put_in_force_where_vllm_sees_it_and_taken_back(
    played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not allocator.expandable()
    assert allocator.expand() is None and allocator.expand() is None  # the second pair of a process
    assert played.options == os.environ[CONF] == "expandable_segments:True"
    assert allocator.expandable()
    allocator.collapse()
    assert played.options == "expandable_segments:False" and CONF not in os.environ
    assert not allocator.expandable()
    played.options = "untouched"
    allocator.collapse()
    assert played.options == "untouched"


def test_other_options_stay(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CONF, "garbage_collection_threshold:0.8")
    assert allocator.expand() is None
    assert played.options == "garbage_collection_threshold:0.8,expandable_segments:True"
    allocator.collapse()
    assert played.options == os.environ[CONF] == "garbage_collection_threshold:0.8"


@pytest.mark.parametrize(
    ("variable", "value", "why"),
    [
        (CONF, "expandable_segments:False", "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False"),
        ("PYTORCH_ALLOC_CONF", "max_split_size_mb:64", "vLLM looks for them in PYTORCH_CUDA_ALLOC_CONF"),
        (CONF, "backend:cudaMallocAsync", "backend:cudaMallocAsync"),
        ("WORLD_SIZE", "2", "several processes"),
    ],
)
def test_what_a_person_has_set_wins(
    played: Played, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, why: str
) -> None:
    monkeypatch.setenv(variable, value)
    found = allocator.expand()
    assert found is not None and why in found
    assert played.options == "" and not allocator.expandable()
    allocator.collapse()
    assert os.environ[variable] == value


@pytest.mark.parametrize("variable", ["PYTORCH_ALLOC_CONF", CONF])
def test_on_by_the_environment_stays_on(played: Played, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "expandable_segments:True")
    assert allocator.expand() is None and allocator.expandable()
    allocator.collapse()
    assert played.options == "" and allocator.expandable()


def test_a_platform_without_them_is_as_it_was(played: Played) -> None:
    played.offered = False
    found = allocator.expand()
    assert found == "torch does not take them"
    assert CONF not in os.environ and played.options == "expandable_segments:False"


def test_a_failing_setter_is_told_and_stops_nothing(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(options: str) -> None:
        raise RuntimeError("no such option")

    with monkeypatch.context() as broken:
        broken.setattr(torch._C, "_accelerator_setAllocatorSettings", refuse)
        found = allocator.expand()
    assert found is not None and "no such option" in found and CONF not in os.environ


def test_other_platforms_are_not_asked(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    assert allocator.refusal() is None
    monkeypatch.setattr(allocator.sys, "platform", "win32")
    found = allocator.expand()
    assert found == allocator.refusal() == "torch does not offer them on win32" and played.options == ""
