"""Fingerprints follow the code that computes a step, and not its comments."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest

import graftline
from graftline.step_code import CODE

ROOT = Path(graftline.__file__).parent


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
