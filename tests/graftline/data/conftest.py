"""One small build of the starter's data, shared by the tests of this folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from graftline.data.build import build


@pytest.fixture(scope="session")
def sizes() -> dict[str, int]:
    """Rows of each split of the small build."""
    return {"train": 24, "validation": 12, "test": 24}


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory, sizes: dict[str, int]) -> Path:
    """A folder with a small build; never change it."""
    folder = tmp_path_factory.mktemp("built") / "data"
    build(folder, sizes)
    return folder


@pytest.fixture
def data(built: Path, tmp_path: Path) -> Path:
    """A copy of the small build that a test may damage."""
    return Path(shutil.copytree(built, tmp_path / "data"))
