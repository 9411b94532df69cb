"""What an adapter declares: its ``relies_on``, and the targets of the patches that stand in its file.

Building the patches may need the library itself, so their targets are read from the adapter's source instead: the first
two arguments of each ``Patch(…)`` call, as literals or as names of constants.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

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
    module = f"rlpatch.adapters.{name.replace('/', '.')}"
    found, unknown = _patches(_parsed(module), _constants(module))
    return Targets(tuple(dict.fromkeys(found)), tuple(unknown))


@cache
def _parsed(module: str) -> ast.Module:
    """An adapter's file or shared code; not imported, for some shared code imports torch."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None, module
    return ast.parse(Path(spec.origin).read_text(encoding="utf-8"))


def _shared(tree: ast.AST) -> Iterator[tuple[str, str, str]]:
    """(module, name there, name here) of what is imported from shared code (``_….py``)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and ".adapters." in (node.module or "") and "._" in (node.module or ""):
            for alias in node.names:
                yield str(node.module), alias.name, alias.asname or alias.name


@cache
def _constants(module: str) -> dict[str, str]:
    """Texts that have a name in `module`, at any level, its own and imported ones."""
    found = {here: _constants(origin).get(there) for origin, there, here in _shared(_parsed(module))}
    for node in ast.walk(_parsed(module)):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            found.update({target.id: node.value.value for target in node.targets if isinstance(target, ast.Name)})
    return {name: text for name, text in found.items() if text is not None}


def _patches(tree: ast.AST, constants: Mapping[str, str]) -> tuple[list[tuple[str, str]], list[str]]:
    def text(node: ast.expr | None) -> str | None:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return node.value
        return constants.get(node.id) if isinstance(node, ast.Name) else None

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
    for origin, name, _ in _shared(tree):
        for node in _parsed(origin).body:  # the function that builds patches, or the name of one
            own = isinstance(node, ast.FunctionDef) and node.name == name
            if own or (
                isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets)
            ):
                more = _patches(node, _constants(origin))
                found += more[0]
                unknown += more[1]
    return found, unknown


def contract(adapter: Adapter) -> tuple[Relies, ...]:
    """Everything that `adapter` relies on in its library: declared, and the targets of its patches.

    What lies in another distribution (a plugin's module) is declared for the reader and not checked here.
    """
    declared = {r.target for r in adapter.relies_on if not r.versions and not r.otherwise}
    targets = patch_targets(adapter.name).found if adapter.patches is not None else ()
    patched = [Relies(f"{module}:{path}") for module, path in targets if module.split(".")[0] == adapter.library]
    own = (relies for relies in adapter.relies_on if relies.module.split(".")[0] == adapter.library)
    return (*own, *(relies for relies in patched if relies.target not in declared))


def undeclared(adapter: Adapter) -> list[str]:
    """Paths of patches that can neither be read from the adapter's file nor stand in its ``relies_on``.

    A path that is put together at run time (``"?"``) is taken for declared where anything is: by hand, then.
    """
    declared = {relies.path for relies in adapter.relies_on} | ({"?"} if adapter.relies_on else set())
    return [path for path in patch_targets(adapter.name).unknown if path not in declared]
