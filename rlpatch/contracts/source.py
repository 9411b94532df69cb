"""A release's source code as definitions: what a dotted target is, its parameters, its normalized code.

Everything is read with `ast`; nothing of the library is imported. Names are followed through imports and base classes
inside the library, as Python would find them at run time.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from rlpatch.errors import SourceError

_Function = (ast.FunctionDef, ast.AsyncFunctionDef)
_LOGGERS = ("logger", "_logger", "log", "logging", "warnings")
_DEEP = 12  # imports and bases that are followed; a chain of more is a circle
_MESSAGE = "…"


@dataclass(frozen=True)
class Definition:
    """Where a target is defined.

    Attributes:
        module: Full name of the defining module.
        node: Its definition: module, class, function, or the assignment that makes it.
        owner: The class that it was found in, or None.
        external: Imported from outside of the library: there is nothing more to tell.
    """

    module: str
    node: ast.AST | None
    owner: ast.ClassDef | None = None
    external: bool = False


@lru_cache(maxsize=512)
def _parsed(name: str, checksum: int, size: int, text: bytes) -> ast.Module:
    # From release to release most files stay the same; the text is part of the key, so that a checksum cannot mislead.
    return ast.parse(text, name)


class Tree:
    """One release's Python files.

    Args:
        path: The zip that `rlpatch.contracts.fetch.source` gives.
        library: The top-level package.
    """

    def __init__(self, path: Path, library: str) -> None:
        self.library = library
        self._archive = zipfile.ZipFile(path)
        self._members = {info.filename: info for info in self._archive.infolist()}
        self._modules: dict[str, ast.Module | None] = {}
        self._bound: dict[str, dict[str, list[ast.AST]]] = {}

    # ---- modules -----------------------------------------------------------------------------------------------

    def _file(self, module: str) -> str | None:
        path = module.replace(".", "/")
        return next((name for name in (f"{path}/__init__.py", f"{path}.py") if name in self._members), None)

    def module(self, name: str) -> ast.Module | None:
        """The parsed module, or None when the release has none of that name.

        Raises:
            SourceError: it cannot be parsed by this Python.
        """
        if name not in self._modules:
            file = self._file(name)
            if file is None:
                self._modules[name] = None
            else:
                info = self._members[file]
                try:
                    self._modules[name] = _parsed(file, info.CRC, info.file_size, self._archive.read(info))
                except (SyntaxError, ValueError) as error:
                    version = ".".join(map(str, sys.version_info[:2]))
                    raise SourceError(
                        f"{file} cannot be parsed by Python {version} ({error}); run this with a newer Python"
                    ) from None
        return self._modules[name]

    def _bindings(self, module: str) -> dict[str, list[ast.AST]]:
        """name -> the statements at the module's top level (branches included) that bind it."""
        if module not in self._bound:
            bound: dict[str, list[ast.AST]] = {}
            tree = self.module(module)
            for statement in _statements(tree.body if tree is not None else []):
                for name in _bound_names(statement):
                    bound.setdefault(name, []).append(statement)
            self._bound[module] = bound
        return self._bound[module]

    # ---- targets -----------------------------------------------------------------------------------------------

    def find(self, module: str, path: str) -> Definition | None:
        """What ``module:path`` is in this release, or None when there is no such thing."""
        tree = self.module(module)
        if tree is None:
            return None
        if not path:
            return Definition(module, tree)
        first, *rest = path.split(".")
        found = self._global(module, first)
        for name in rest:
            if found is None or found.external or not isinstance(found.node, ast.ClassDef):
                return None
            found = self.attribute(found, name)
        return found

    def _global(self, module: str, name: str, depth: int = 0) -> Definition | None:
        if depth > _DEEP:
            return None
        bound = self._bindings(module)
        if name in bound:
            node = _decisive(bound[name])
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                return self._imported(module, node, name, depth)
            return Definition(module, node)
        for node in bound.get("*", ()):
            if isinstance(node, ast.ImportFrom):
                origin = self._origin(module, node)
                if self._inside(origin):
                    found = self._global(origin, name, depth + 1)
                    if found is not None:
                        return found
        if self._file(f"{module}.{name}") is not None:
            return Definition(f"{module}.{name}", self.module(f"{module}.{name}"))
        return None

    def _inside(self, module: str) -> bool:
        return module.split(".")[0] == self.library

    def _origin(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        package = module if (self._file(module) or "").endswith("__init__.py") else module.rpartition(".")[0]
        for _ in range(node.level - 1):
            package = package.rpartition(".")[0]
        return f"{package}.{node.module}" if node.module else package

    def _imported(self, module: str, node: ast.Import | ast.ImportFrom, name: str, depth: int) -> Definition | None:
        alias = next(a for a in node.names if (a.asname or a.name.split(".")[0]) == name)
        if isinstance(node, ast.Import):
            origin = alias.name if alias.asname else name
            if not self._inside(origin):
                return Definition(module, node, external=True)
            tree = self.module(origin)
            return Definition(origin, tree) if tree is not None else None
        origin = self._origin(module, node)
        if not self._inside(origin):
            return Definition(module, node, external=True)
        return self._global(origin, alias.name, depth + 1) if self._file(origin) else None

    def attribute(self, owner: Definition, name: str) -> Definition | None:
        """A class's attribute: of its body or its bases', else one that a method assigns to ``self``."""
        classes = list(self._ancestry(owner))
        for each in classes:
            assert isinstance(each.node, ast.ClassDef)
            bound = [s for s in _statements(each.node.body) if name in _bound_names(s)]
            if bound:
                return Definition(each.module, _decisive(bound), each.node)
        for each in classes:
            assert isinstance(each.node, ast.ClassDef)
            for node in ast.walk(each.node):
                if name in _self_names(node):
                    return Definition(each.module, node, each.node)
        return None

    def _ancestry(self, owner: Definition, depth: int = 0) -> Iterator[Definition]:
        """The class and its bases, as far as they are the library's own."""
        yield owner
        if depth > _DEEP or not isinstance(owner.node, ast.ClassDef):
            return
        for base in owner.node.bases:
            while isinstance(base, ast.Subscript):
                base = base.value
            parts = ast.unparse(base).split(".")
            found = self._global(owner.module, parts[0])
            for part in parts[1:]:
                if found is None or found.external:
                    break
                found = (
                    self._global(found.module, part)
                    if isinstance(found.node, ast.Module)
                    else self.attribute(found, part)
                )
            if found is not None and isinstance(found.node, ast.ClassDef) and found.node is not owner.node:
                yield from self._ancestry(found, depth + 1)

    # ---- parameters --------------------------------------------------------------------------------------------

    def parameters(self, found: Definition) -> tuple[list[str], set[str]]:
        """(names that can be given by position, in order and without ``self``; all names, ``"**"`` for any other)."""
        if isinstance(found.node, ast.ClassDef):
            init = self.attribute(found, "__init__")
            if init is not None and isinstance(init.node, _Function):
                return self.parameters(init)
            fields: dict[str, None] = {}
            for each in reversed(list(self._ancestry(found))):
                assert isinstance(each.node, ast.ClassDef)
                for statement in each.node.body:
                    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                        fields.setdefault(statement.target.id)
            return list(fields), set(fields)
        if not isinstance(found.node, _Function):
            return [], set()
        arguments = found.node.args
        positional = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
        static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in found.node.decorator_list)
        if found.owner is not None and not static:
            positional = positional[1:]
        names = {*positional, *(argument.arg for argument in arguments.kwonlyargs)}
        if arguments.kwarg is not None:
            names.add("**")
        return positional, names

    # ---- hints -------------------------------------------------------------------------------------------------

    def defining(self, name: str, most: int = 3) -> list[str]:
        """Modules that define a class or function `name`, anywhere in the release."""
        needles = [f"{kind} {name}{end}".encode() for kind in ("def", "class") for end in ("(", ":")]
        found = []
        for file, info in self._members.items():
            text = self._archive.read(info)
            if any(needle in text for needle in needles):
                found.append(file.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
        return sorted(found, key=lambda module: (module.count("."), module))[:most]


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a body, and of its branches (``if``, ``try``, ``with``), not of functions and classes."""
    for statement in body:
        yield statement
        for field in ("body", "orelse", "finalbody"):
            if not isinstance(statement, (*_Function, ast.ClassDef)):
                yield from _statements(getattr(statement, field, []))
        for handler in getattr(statement, "handlers", []):
            yield from _statements(handler.body)


def _bound_names(statement: ast.AST) -> list[str]:
    if isinstance(statement, (*_Function, ast.ClassDef)):
        return [statement.name]
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return [alias.asname or alias.name.split(".")[0] for alias in statement.names]
    if isinstance(statement, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        return [node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]
    return []


def _decisive(bound: list[Any]) -> ast.AST:
    """Of several statements that bind a name: the last definition (overloads come first), else the first binding."""
    definitions = [node for node in bound if isinstance(node, (*_Function, ast.ClassDef))]
    return definitions[-1] if definitions else bound[0]


def _self_names(node: ast.AST) -> list[str]:
    """Attributes of ``self`` that this statement assigns."""
    if isinstance(node, ast.Assign):
        targets: list[ast.expr] = node.targets
    elif isinstance(node, (ast.AnnAssign, ast.AugAssign)):
        targets = [node.target]
    else:
        return []
    return [
        each.attr
        for target in targets
        for each in ast.walk(target)
        if isinstance(each, ast.Attribute) and isinstance(each.value, ast.Name) and each.value.id == "self"
    ]


# ---- normalized code -----------------------------------------------------------------------------------------------------


class _Normal(ast.NodeTransformer):
    """Drops what does not act: docstrings, annotations, log calls, the words of errors."""

    def _scope(self, node: Any) -> Any:
        self.generic_visit(node)
        first = node.body[0] if node.body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            node.body = node.body[1:]
        return self._filled(node)

    def _filled(self, node: Any) -> Any:
        if hasattr(node, "body") and not node.body:
            node.body = [ast.Pass()]
        return node

    def _function(self, node: Any) -> Any:
        node.returns = None
        return self._scope(node)

    visit_FunctionDef = visit_AsyncFunctionDef = _function
    visit_ClassDef = visit_Module = _scope

    def visit_arg(self, node: ast.arg) -> Any:
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> Any:
        if node.value is None:
            return None
        self.generic_visit(node)
        return ast.Assign(targets=[node.target], value=node.value)

    def visit_Expr(self, node: ast.Expr) -> Any:
        call = node.value
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
            base = call.func.value
            if isinstance(base, ast.Name) and base.id in _LOGGERS:
                return None
        return self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> Any:
        self.generic_visit(node)
        if isinstance(node.exc, ast.Call):
            node.exc.args = [ast.Constant(_MESSAGE) if _is_text(argument) else argument for argument in node.exc.args]
        return node

    def visit_Assert(self, node: ast.Assert) -> Any:
        self.generic_visit(node)
        node.msg = None
        return node

    def generic_visit(self, node: ast.AST) -> Any:
        super().generic_visit(node)
        return self._filled(node) if isinstance(node, (ast.If, ast.For, ast.While, ast.With, ast.Try)) else node


def _is_text(node: ast.AST) -> bool:
    if isinstance(node, ast.BinOp):
        return _is_text(node.left) or _is_text(node.right)
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def normal(node: ast.AST) -> ast.AST:
    """A copy of `node` without docstrings, annotations, log calls and the words of error messages."""
    found = _Normal().visit(copy.deepcopy(node))
    return ast.fix_missing_locations(found if found is not None else copy.deepcopy(node))


def normal_text(node: ast.AST) -> str:
    """`normal` as source code, for showing differences."""
    return ast.unparse(normal(node))


_LEFT_OUT = ("ctx", "type_comment", "kind", "type_ignores")


def _canon(node: Any, seen: set[str] | None = None) -> str:
    """One text per syntax tree, the same under every Python (`ast.dump` is not); adds each part's to `seen`."""
    if isinstance(node, ast.AST):
        fields = [(name, value) for name, value in ast.iter_fields(node) if name not in _LEFT_OUT]
        given = ",".join(f"{name}={_canon(value, seen)}" for name, value in fields if value is not None and value != [])
        text = f"{type(node).__name__}({given})"
        if seen is not None and isinstance(node, (ast.expr, ast.stmt)):
            seen.add(text)
        return text
    if isinstance(node, list):
        return f"[{','.join(_canon(each, seen) for each in node)}]"
    return repr(node)


def fingerprint(node: ast.AST) -> str:
    """12 hexadecimal digits of the sha256 of the normalized code."""
    return hashlib.sha256(_canon(normal(node)).encode()).hexdigest()[:12]


def parts(node: ast.AST) -> set[str]:
    """The canonical text of every expression and statement in the code of `node`, not normalized; see `snippet`."""
    seen: set[str] = set()
    _canon(node, seen)
    return seen


def snippet(text: str) -> str:
    """The canonical text of one expression or statement.

    Raises:
        ValueError: `text` is not one expression or statement.
    """
    try:
        body = ast.parse(text).body
    except SyntaxError as error:
        raise ValueError(f"{text!r} is no Python code: {error}") from None
    if len(body) != 1:
        raise ValueError(f"{text!r} is not one expression or statement")
    first = body[0]
    return _canon(first.value if isinstance(first, ast.Expr) else first)
