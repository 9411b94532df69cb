"""What an adapter declares: its ``relies_on``, and the targets of the patches that stand in its file.

Building the patches may need the library itself, so their targets are read from the adapter's source instead: the first
two arguments of each ``Patch(…)`` call, as literals or as names of constants.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

from rlpatch.patching import Patch
from rlpatch.registry import Adapter
from rlpatch.relies import Relies


@dataclass(frozen=True)
class Targets:
    """What an adapter's file patches.

    Attributes:
        found: Module and path of each patch.
        unknown: Paths (or ``"?"``) of ``Patch(…)`` calls whose module only shows when they are built.
    """

    found: tuple[tuple[str, str], ...]
    unknown: tuple[str, ...]


@cache
def patch_targets(name: str) -> Targets:
    """The targets of the patches in adapter file `name` (e.g. ``"vllm/engine_v0_9"``) and in the shared code it imports."""
    module = importlib.import_module(f"rlpatch.adapters.{name.replace('/', '.')}")
    found, unknown = _in_module(module, ast.parse(inspect.getsource(module)))
    return Targets(tuple(dict.fromkeys(found)), tuple(unknown))


def _in_module(module: ModuleType, tree: ast.Module) -> tuple[list[tuple[str, str]], list[str]]:
    constants = {
        target.id: node.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for target in node.targets
        if isinstance(target, ast.Name)
    }

    def text(node: ast.expr | None) -> str | None:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return node.value
        if isinstance(node, ast.Name):
            value = constants.get(node.id, getattr(module, node.id, None))
            return value if isinstance(value, str) else None
        return None

    found: list[tuple[str, str]] = []
    unknown: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Patch":
            given: dict[str | None, ast.expr] = dict(zip(("module", "path"), node.args, strict=False))
            given.update({keyword.arg: keyword.value for keyword in node.keywords})
            where, path = text(given.get("module")), text(given.get("path"))
            if where is not None and path is not None:
                found.append((where, path))
            else:
                unknown.append(path or "?")
        elif isinstance(node, ast.ImportFrom) and ".adapters." in (node.module or "") and "._" in (node.module or ""):
            for alias in node.names:
                more = _imported(importlib.import_module(str(node.module)), alias.name)
                found += more[0]
                unknown += more[1]
    return found, unknown


def _imported(helper: ModuleType, name: str) -> tuple[list[tuple[str, str]], list[str]]:
    """What a name imported from shared code patches: a `Patch`, or a function that builds some."""
    value: Any = getattr(helper, name, None)
    if isinstance(value, Patch):
        return [(value.module, value.path)], []
    if inspect.isfunction(value) and value.__module__ == helper.__name__:
        return _in_module(helper, ast.parse(inspect.getsource(value)))
    return [], []


def contract(adapter: Adapter) -> tuple[Relies, ...]:
    """Everything that `adapter` relies on in its library: declared, and the targets of its patches."""
    declared = {r.target for r in adapter.relies_on if not r.versions and not r.otherwise}
    targets = patch_targets(adapter.name).found if adapter.patches is not None else ()
    patched = [Relies(f"{module}:{path}") for module, path in targets if module.split(".")[0] == adapter.library]
    return (*adapter.relies_on, *(relies for relies in patched if relies.target not in declared))


def undeclared(adapter: Adapter) -> list[str]:
    """Paths of patches that can neither be read from the adapter's file nor stand in its ``relies_on``."""
    declared = {relies.path for relies in adapter.relies_on}
    return [path for path in patch_targets(adapter.name).unknown if path not in declared]
