"""Where a run's outputs lie; imports nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from graftline.recipe import Recipe


def report_folder(recipe: Recipe) -> Path:
    """Where a run's report lies."""
    return Path("reports") / recipe.name / recipe.method / f"seed-{recipe.seed}"


def search_file(recipe: Recipe, rule: str) -> Path:
    """Where the search of a rule's parameters is recorded."""
    return Path("reports") / recipe.name / "search" / f"{rule}-seed-{recipe.seed}.json"


def compose_folder(recipe_name: str) -> Path:
    """Where the table of a recipe's compositions lies."""
    return Path("reports") / recipe_name / "compose"


def pictures(folder: Path) -> list[Path]:
    """The paths of a report's pictures: the score matrix, the scores over stages."""
    return [folder / "scores.png", folder / "stages.png"]


def finished_reports(recipe_name: str) -> list[Path]:
    """Report folders of a recipe's finished runs, by method and seed."""
    found = Path("reports", recipe_name).glob("*/seed-*/metrics.json")
    return sorted((path.parent for path in found), key=_method_and_seed)


def _method_and_seed(folder: Path) -> tuple[str, int]:
    return folder.parent.name, int(folder.name.removeprefix("seed-"))
