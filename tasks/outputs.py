"""Where a run's outputs lie; imports nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from graftline.recipe import Recipe


def report_folder(recipe: Recipe) -> Path:
    """Where a run's report lies."""
    return Path("reports") / recipe.name / recipe.method / f"seed-{recipe.seed}"


def pictures(folder: Path) -> list[Path]:
    """The paths of a report's pictures: the score matrix, the scores over stages."""
    return [folder / "scores.png", folder / "stages.png"]
