"""Patches: every order of import, apply and revert; all or nothing; originals come back identical."""

from __future__ import annotations

import importlib
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from rlpatch.errors import PatchError
from rlpatch.patching import Patch, PatchSet

SOURCE = """
    def free(x):
        return x + 1

    class Base:
        def inherited(self, x):
            return ("base", x)

    class Thing(Base):
        def method(self, x):
            return ("method", x)

        @staticmethod
        def static(x):
            return ("static", x)

        @classmethod
        def klass(cls, x):
            return (cls.__name__, x)

    one = Thing()
"""
PATHS = ("free", "Thing.method", "Thing.static", "Thing.klass", "Thing.inherited", "one.method", "one.klass")


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of an importable module, not imported yet."""
    name = f"rlpatch_target_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(SOURCE))
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield name
    sys.modules.pop(name, None)


def raw(module: Any, path: str) -> Any:
    parent: Any = module
    *parts, last = path.split(".")
    for part in parts:
        parent = getattr(parent, part)
    return vars(parent).get(last)


def call(module: Any, path: str) -> Any:
    owner: Any = module
    if path.startswith("Thing."):
        owner, path = module.Thing(), path.split(".")[1]
    elif path.startswith("one."):
        owner, path = module.one, path.split(".")[1]
    return getattr(owner, path)(1)


def marked(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    return ("patched", wrapped(*args, **kwargs))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("order", ["import-apply", "apply-import", "import-apply-apply", "apply-apply-import"])
def test_every_order(target: str, path: str, order: str) -> None:
    patch_set = PatchSet("test", [Patch(target, path, marked)])
    original = None
    for act in order.split("-"):
        if act == "apply":
            patch_set.apply()
        else:
            module = importlib.import_module(target)
            if "apply" in order.split("-")[: order.split("-").index("import")]:
                assert call(module, path)[0] == "patched"
            else:
                original = raw(module, path)
    module = sys.modules[target]
    assert patch_set.state == "applied"
    result = call(module, path)
    assert result[0] == "patched" and result[1] != ("patched",) and "patched" not in str(result[1])  # once, not twice
    assert patch_set.revert() == []
    if original is not None or order.startswith("import"):
        assert raw(module, path) is original
    assert "patched" not in str(call(module, path))
    assert patch_set.revert() == []


def test_a_method_of_one_object_alone(target: str) -> None:
    """Its method is bound to it, and others of its class have theirs."""
    module = importlib.import_module(target)
    patch_set = PatchSet("test", [Patch(target, "one.method", marked)])
    patch_set.apply()
    assert module.one.method(1) == ("patched", ("method", 1)) and module.Thing().method(1) == ("method", 1)
    patch_set.revert()
    assert vars(module.one) == {} and module.one.method(1) == ("method", 1)
    with pytest.raises(PatchError, match=r"one\.gone"):
        PatchSet("test", [Patch(target, "one.gone", marked)]).apply()


def test_a_set_that_is_switched_off_forwards(target: str) -> None:
    module = importlib.import_module(target)
    patch_set = PatchSet("test", [Patch(target, "free", marked)])
    with pytest.raises(PatchError, match="test is idle"):
        patch_set.switch(False)
    patch_set.apply()
    late = PatchSet("late", [Patch(target, "free", marked), Patch("rlpatch_never_imported", "x", marked)])
    late.apply()
    assert late.state == "armed"
    late.switch(False)
    for on in (False, False, True):
        patch_set.switch(on)
        assert module.free(1) == (("patched", 2) if on else 2)
    patch_set.switch(False)
    late.revert()
    assert patch_set.revert() == [] and module.free(1) == 2
    patch_set.apply()
    assert module.free(1) == ("patched", 2)


def test_revert_before_import_never_patches(target: str) -> None:
    patch_set = PatchSet("test", [Patch(target, "free", marked)])
    patch_set.apply()
    assert patch_set.state == "armed"
    patch_set.revert()
    assert importlib.import_module(target).free(1) == 2


def test_apply_again_after_revert(target: str) -> None:
    module = importlib.import_module(target)
    patch_set = PatchSet("test", [Patch(target, "free", marked)])
    for _ in range(3):
        patch_set.apply()
        assert module.free(1) == ("patched", 2)
        patch_set.revert()
        assert module.free(1) == 2


def test_all_or_nothing(target: str) -> None:
    module = importlib.import_module(target)
    before = {path: raw(module, path) for path in PATHS}
    patch_set = PatchSet(
        "test", [*(Patch(target, path, marked) for path in PATHS), Patch(target, "Thing.gone", marked)]
    )
    with pytest.raises(PatchError, match=r"Thing\.gone"):
        patch_set.apply()
    assert patch_set.state == "failed"
    assert {path: raw(module, path) for path in PATHS} == before
    assert all(raw(module, path) is before[path] for path in PATHS)


def test_failure_after_deferral_rolls_back_what_was_wrapped(target: str, tmp_path: Path) -> None:
    module = importlib.import_module(target)
    other = f"{target}_late"
    (tmp_path / f"{other}.py").write_text("x = 1\n")
    importlib.invalidate_caches()
    original = module.free
    changes = []
    patch_set = PatchSet("test", [Patch(target, "free", marked), Patch(other, "nothing_here", marked)])
    patch_set.on_change = lambda changed: changes.append(changed.state)
    patch_set.apply()
    assert patch_set.state == "armed" and module.free(1) == ("patched", 2)
    importlib.import_module(other)  # the import itself must not fail
    assert patch_set.state == "failed" and isinstance(patch_set.error, PatchError)
    assert module.free is original
    assert changes[-1] == "failed"


def test_last_in_first_out(target: str) -> None:
    module = importlib.import_module(target)
    original = module.free
    inner, outer = (PatchSet(n, [Patch(target, "free", marked)]) for n in ("inner", "outer"))
    inner.apply()
    outer.apply()
    assert module.free(1) == ("patched", ("patched", 2))
    outer.revert()
    assert module.free(1) == ("patched", 2)
    inner.revert()
    assert module.free is original


def test_wrapped_over_by_somebody_else_is_switched_off_and_told(target: str) -> None:
    module = importlib.import_module(target)
    patch_set = PatchSet("test", [Patch(target, "free", marked)])
    patch_set.apply()
    ours = module.free
    module.free = lambda x: ("theirs", ours(x))
    notes = patch_set.revert()
    assert len(notes) == 1 and "switched off" in notes[0]
    assert module.free(1) == ("theirs", 2)


def test_exception_passes_through_and_signature_stays(target: str) -> None:
    import inspect

    module = importlib.import_module(target)
    signature = inspect.signature(module.free)
    patch_set = PatchSet("test", [Patch(target, "free", marked)])
    patch_set.apply()
    assert inspect.signature(module.free) == signature
    with pytest.raises(TypeError):
        module.free("a")
    patch_set.revert()
