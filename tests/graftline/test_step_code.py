"""Fingerprints follow the code that computes a step, and not its comments."""

from __future__ import annotations

import ast
import importlib.util
import shutil
from pathlib import Path
from typing import get_args

import pytest

import graftline
from graftline.planning.run import plan_run
from graftline.recipe import MethodName
from graftline.settings.reading import load_recipe
from graftline.step_code import ADDED, CODE

ROOT = Path(graftline.__file__).parent
TINY = ROOT.parent / "params/tiny.yaml"
METHODS = [name for names in get_args(MethodName) for name in get_args(names) or [names]]
NAMES = ("image", "audio", "video", "point_cloud")
SAYS_NOTHING = {
    "data/parts.py",  # fetched bytes are compared by sha256
    "durable.py",
    "errors.py",
    "evaluation/__init__.py",
    "memory.py",
    "model/building.py",  # a lock
    "object_urls.py",
    "progress.py",
    "recipe.py",  # what is set stands in a step's parameters
    "recipe_parts.py",
    "team.py",
    "weight_files.py",
}
"""Imported by what computes steps, without a say in what comes out."""


def _digest(folder: Path, kind: str) -> str:
    """Of a kind of step, by a copy of the library."""
    spec = importlib.util.spec_from_file_location("copied", folder / "step_code.py")
    assert spec and spec.loader
    copied = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copied)
    return str(copied.code_digest(kind))


@pytest.fixture
def library(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ROOT, tmp_path / "graftline"))


@pytest.mark.parametrize("kind", CODE)
def test_every_file_that_a_kind_names_is_there(kind: str) -> None:
    for pattern in CODE[kind]:
        assert any(path.is_file() for path in ROOT.glob(pattern)), pattern


def test_a_changed_helper_gives_other_fingerprints_and_a_comment_does_not(library: Path) -> None:
    before = {kind: _digest(library, kind) for kind in CODE}
    helper = library / "training/optimizer.py"
    code = helper.read_text()
    helper.write_text(code.replace('"""', '"""Another word. ', 1) + "# a comment\n")
    assert {kind: _digest(library, kind) for kind in CODE} == before
    helper.write_text(code + "ANOTHER = 1\n")
    changed = {kind for kind in CODE if _digest(library, kind) != before[kind]}
    assert changed == {kind for kind in CODE if "training/optimizer.py" in CODE[kind]}
    assert {"align", "fine-tune", "realign"} <= changed
    assert not {"evaluate", "perplexity", "merge"} & changed


@pytest.mark.parametrize("path", sorted({path for paths in ADDED.values() for path in paths}))
def test_a_file_added_later_counts_from_its_first_change_on(library: Path, path: str) -> None:
    before = {kind: _digest(library, kind) for kind in CODE}
    file = library / path
    more = "ANOTHER = 1\n" if file.suffix == ".py" else "Another sentence.\n"
    file.write_text(file.read_text() + more)
    changed = {kind for kind in CODE if _digest(library, kind) != before[kind]}
    assert {kind for kind in ADDED if path in ADDED[kind]} <= changed


def _files(kind: str) -> set[str]:
    patterns = (*CODE[kind], *ADDED.get(kind, ()))
    return {path.relative_to(ROOT).as_posix() for each in patterns for path in ROOT.glob(each)}


def _imports(path: str) -> set[str]:
    """Modules of the library that one of its files names, also within functions."""
    if not path.endswith(".py"):
        return set()
    named = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("graftline"):
            inside = ROOT.parent / str(node.module).replace(".", "/")
            named |= {inside / each.name for each in node.names} | {inside}
    found = {each.with_suffix(".py") for each in named} | {each / "__init__.py" for each in named}
    return {each.relative_to(ROOT).as_posix() for each in found if each.is_file()}


def _kinds_before() -> dict[str, set[str]]:
    """Kind of step -> the kinds whose results it can be made of: their code has its say, too."""
    before: dict[str, set[str]] = {kind: set() for kind in CODE}
    files = {name: dict.fromkeys(("train", "validation", "test"), "0") for name in NAMES}
    for method in METHODS:
        for step in plan_run(load_recipe(TINY, {"method": method}), files).steps.values():
            before[step.kind] |= {parent.kind for parent in step.parents.values()}
    for _ in CODE:
        before = {kind: own.union(*(before[each] for each in own)) for kind, own in before.items()}
    return before


def test_what_computes_a_step_imports_nothing_that_no_fingerprint_knows() -> None:
    before, unknown = _kinds_before(), {}
    for kind in CODE:
        known = _files(kind).union(*(_files(each) for each in before[kind]), SAYS_NOTHING)
        unknown[kind] = {named for path in _files(kind) for named in _imports(path)} - known
    assert not any(unknown.values()), unknown
