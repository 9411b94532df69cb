"""Every TRL release's own validation over the arithmetic: what comes out passes it, what passed is left alone.

``__post_init__`` is taken out of each wheel by its syntax tree and run over a stand-in for the dataclass: the body is the
release's, what surrounds it (transformers, the other fields) is not. ``RLPATCH_TEST_TRL_WHEELS`` names a folder of wheels
(``pip download --no-deps trl==… -d FOLDER``); without it nothing runs.
"""

from __future__ import annotations

import ast
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version

from rlpatch.adapters.trl import batch_check_v0_18
from rlpatch.adapters.trl._configs import CLASSES
from rlpatch.config.batching import FIELDS, Batching, Layout, solve
from rlpatch.config.defaults import fix, table
from rlpatch.errors import UsageError

FOLDER = os.environ.get("RLPATCH_TEST_TRL_WHEELS")
WHEELS = sorted(Path(FOLDER).glob("trl-*.whl"), key=lambda p: Version(p.name.split("-")[1])) if FOLDER else []
pytestmark = pytest.mark.skipif(not WHEELS, reason="RLPATCH_TEST_TRL_WHEELS names no folder of TRL wheels")


@cache
def tree(wheel: Path, file: str) -> ast.Module | None:
    with zipfile.ZipFile(wheel) as archive:
        return ast.parse(archive.read(file)) if file in archive.namelist() else None


def class_of(wheel: Path, file: str, name: str) -> ast.ClassDef | None:
    found = tree(wheel, file)
    return next((n for n in found.body if isinstance(n, ast.ClassDef) and n.name == name), None) if found else None


def fields_of(node: ast.ClassDef) -> dict[str, ast.expr | None]:
    return {n.target.id: n.value for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}


def validation(node: ast.ClassDef) -> Callable[[Any], None]:
    """The release's ``__post_init__``, run for its batch arithmetic: calls of the parents' and what concerns other fields
    is dropped, statement by statement; the arithmetic itself is untouched."""
    body = next(n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__post_init__")
    own = {"num_processes", "local_sequence_batch_size", *FIELDS, "num_generations"}

    def concerns(statement: ast.stmt) -> bool:
        names = {n.attr for n in ast.walk(statement) if isinstance(n, ast.Attribute)}
        names |= {n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        if any(isinstance(n, ast.Name) and n.id == "_DEPRECATED_PARAMS" for n in ast.walk(statement)):
            return False
        return bool(names & own) and not {"scale_rewards", "lmbda"} & names

    function = ast.FunctionDef(
        name="validate", args=body.args, body=[s for s in body.body if concerns(s)], decorator_list=[]
    )
    module = ast.fix_missing_locations(ast.Module([function], []))
    for each in ast.walk(module):
        if isinstance(each, ast.FunctionDef) and not hasattr(each, "type_params"):
            each.type_params = []  # Python 3.12 and later want it
    space: dict[str, Any] = {"warnings": warnings}
    exec(compile(module, "released", "exec"), space)  # the release's own code
    return space["validate"]


def constant(value: ast.expr | None) -> Any:
    for keyword in getattr(value, "keywords", []):
        if keyword.arg == "default":
            value = keyword.value
    return value.value if isinstance(value, ast.Constant) else None


def released() -> Iterator[Any]:
    for wheel in WHEELS:
        version = wheel.name.split("-")[1]
        for module, name in CLASSES:
            node = class_of(wheel, f"{module.replace('.', '/')}.py", name)
            # the others call their parent's, or hold no generation batch
            if node is not None and "generation_batch_size" in fields_of(node):
                yield pytest.param(version, node, id=f"{version}-{name}")


RELEASED = list(released())


def config(batching: Batching) -> SimpleNamespace:
    return SimpleNamespace(
        world_size=batching.world_size,
        **{name: getattr(batching, name) for name in (*FIELDS, "num_generations")},
        do_eval=batching.per_device_eval_batch_size is not None,
        eval_strategy="no" if batching.per_device_eval_batch_size is None else "steps",
    )


def refusal(validate: Callable[[Any], None], batching: Batching) -> str | None:
    made = config(batching)
    try:
        validate(made)
    except ValueError as error:
        return str(error)
    if batching.layout is Layout.GROUP:  # what the release derives is what the arithmetic says
        assert made.generation_batch_size == batching.generated
    return None


counts = st.integers(1, 100)


@pytest.mark.parametrize(("version", "node"), RELEASED)
def test_what_is_solved_passes_and_what_passed_stays(version: str, node: ast.ClassDef) -> None:
    validate = validation(node)
    fields = fields_of(node)
    layout = Layout.GROUP if "steps_per_generation" in fields else Layout.PARTITION
    adjustable = "num_generations_eval" in ast.unparse(
        next(n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__post_init__")
    )
    misread = Version(version) < Version("0.19.1") and node.name == "GRPOConfig"  # (a % b) * n
    lenient = Version(version) in (Version("0.20.0"), Version("0.21.0"))  # no check of the evaluation batch
    seen = {"refused": 0, "passed": 0, "misread": 0}

    @settings(max_examples=300, deadline=None, database=None)
    @given(
        st.integers(1, 16), counts, counts, st.integers(2, 32), st.none() | counts, st.none() | counts,
        st.none() | counts, st.none() | st.integers(2, 32), st.booleans(),
    )  # fmt: skip
    def check(
        world: int, batch: int, accumulation: int, n: int, steps: int | None, size: int | None,
        evaluation: int | None, group: int | None, both: bool,
    ) -> None:  # fmt: skip
        if layout is Layout.PARTITION:
            steps = evaluation = group = None
        elif steps is not None and size is not None:
            steps, size = (steps, None) if both else (None, size)
        asked = Batching(
            world, batch, accumulation, n, steps, size, evaluation, group if adjustable else None, layout, adjustable
        )
        if misread and asked.generated % (world * batch):
            seen["misread"] += size is not None and size % batch == 0
        else:
            before = refusal(validate, asked)
            ours = asked.train_problem() or asked.eval_problem()
            if lenient and asked.train_problem() is None:
                assert before is None
            else:
                assert (before is None) == (ours is None), (before, ours)
            seen["passed" if before is None else "refused"] += 1
            if ours is None:
                assert solve(asked) == asked
        found = solve(asked)
        if found is None:
            assert asked.eval_problem() is not None
            found = solve(replace(asked, per_device_eval_batch_size=None))
            assert found is not None
        assert refusal(validate, found) is None

    check()
    assert seen["refused"] > 20 and seen["passed"] > 5, seen


@pytest.mark.parametrize(("version", "node"), RELEASED)
def test_defaults_of_the_release_end_valid(version: str, node: ast.ClassDef) -> None:
    """The listing over each release's own default values, with one to all of the batch settings given."""
    validate, fields = validation(node), fields_of(node)
    values = {name: constant(value) for name, value in fields.items()}
    values |= {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "per_device_eval_batch_size": 8}
    grid = [{}] + [
        dict(zip(names, (3, 2, 6), strict=False))
        for names in (
            ["per_device_train_batch_size"],
            ["gradient_accumulation_steps"],
            ["num_generations"],
            ["per_device_train_batch_size", "gradient_accumulation_steps", "num_generations"],
        )
    ]
    for world in (1, 2, 4, 6):
        for given_values in grid:
            merged = {**values, **given_values}
            found = fix(
                merged, merged.keys() - given_values.keys(), given_values.keys(),
                defaults=table(eight_bit=True), world_size=world,
            )  # fmt: skip
            assert found.after is not None and refusal(validate, found.after) is None, (world, given_values)
            end = {**merged, **{change.field: change.new for change in found.changes}}
            assert end["num_generations"] == (
                given_values.get("num_generations") or (1 if values["num_generations"] == 1 else end["num_generations"])
            )


@pytest.mark.parametrize("wheel", [w for w in WHEELS if Version(w.name.split("-")[1]) < Version("0.19.1")], ids=str)
def test_the_check_that_is_misread(wheel: Path) -> None:
    """0.18.0–0.19.0: 12 completions over 2 × 4 pass the release's check, and 4 of them would be dropped."""
    node = class_of(wheel, "trl/trainer/grpo_config.py", "GRPOConfig")
    assert node is not None
    asked = Batching(2, 4, 1, 4, generation_batch_size=12)
    made = config(asked)
    validation(node)(made)
    assert made.steps_per_generation == 1  # 8 of the 12
    assert "no multiple of 2 × 4 = 8" in (asked.train_problem() or "")
    assert solve(asked) == replace(asked, generation_batch_size=8)

    def corrected(batching: Batching) -> None:
        made = config(batching)
        batch_check_v0_18._post_init(lambda: validation(node)(made), made, (), {})

    with pytest.raises(UsageError, match=r"generation_batch_size \(12\) must be divisible .*\(8 = 2 × .*=4\)"):
        corrected(asked)
    corrected(replace(asked, generation_batch_size=16))
    with pytest.raises(ValueError, match="divisible by the number of generations"):
        corrected(replace(asked, generation_batch_size=24, num_generations=5))


def test_every_class_is_where_its_patch_looks() -> None:
    """A module that a release has must have the class, or none of the adapter's patches would stay."""
    for wheel in WHEELS:
        for module, name in CLASSES:
            file = f"{module.replace('.', '/')}.py"
            if tree(wheel, file) is not None:
                assert class_of(wheel, file, name) is not None, f"{wheel.name}: {module} has no {name}"
        scripts = class_of(wheel, "trl/scripts/utils.py", "TrlParser")
        assert scripts and "set_defaults_with_config" in ast.unparse(scripts)
        parser = "trl/scripts/_hf_argparser.py"
        assert tree(wheel, parser) is None or class_of(wheel, parser, "HfArgumentParser") is not None


def test_no_config_with_groups_is_forgotten() -> None:
    known = set(CLASSES)
    for wheel in WHEELS:
        with zipfile.ZipFile(wheel) as archive:
            files = [f for f in archive.namelist() if re.fullmatch(r"trl/(trainer|experimental)/.*_config\.py", f)]
            files = [file for file in files if b"num_generations" in archive.read(file)]
        for file in files:
            for node in tree(wheel, file).body:  # type: ignore[union-attr]
                if isinstance(node, ast.ClassDef) and "num_generations" in fields_of(node):
                    assert (file[:-3].replace("/", "."), node.name) in known, wheel.name


def test_the_layouts_are_told_apart_by_their_fields() -> None:
    for parameter in RELEASED:
        fields = fields_of(parameter.values[1])
        source = ast.unparse(parameter.values[1])
        assert ("steps_per_generation" in fields) == ("must be divisible by" in source), parameter.id
