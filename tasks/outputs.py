"""Where a run's outputs lie; imports nothing heavy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from graftline.recipe import Recipe


def usual_order(recipe_path: Path | str) -> tuple[str, ...]:
    """The order of modalities that a recipe's file names; empty if it names none."""
    content = yaml.safe_load(Path(recipe_path).read_text(encoding="utf-8"))
    return tuple(content.get("order") or ())


def report_folder(recipe: Recipe, usual: Sequence[str]) -> Path:
    """Where a run's report lies: runs in another order than the usual one have their own folder.

    Args:
        recipe: the recipe.
        usual: the order that its file names.
    """
    folder = Path("reports") / recipe.name / recipe.method
    if _unusual(recipe, usual):
        folder /= f"order-{'-'.join(recipe.order)}"
    return folder / f"seed-{recipe.seed}"


def run_name(recipe: Recipe, usual: Sequence[str]) -> str:
    """What people call a run: its method and seed, and its order where it is not the usual one."""
    name = f"{recipe.method} seed {recipe.seed}"
    return f"{name}, {' '.join(recipe.order)}" if _unusual(recipe, usual) else name


def model_alias(recipe: Recipe, usual: Sequence[str]) -> str:
    """The alias of a run's last model among the recipe's registered models."""
    order = ["-".join(recipe.order)] if _unusual(recipe, usual) else []
    return "-".join([alias_of(recipe.method), *order])


def alias_of(words: str) -> str:
    """A method as MLflow takes it in an alias: letters, digits, - and _ alone."""
    return words.replace("+", "-plus")


def search_file(recipe: Recipe, rule: str) -> Path:
    """Where the search of a rule's parameters is recorded."""
    return Path("reports") / recipe.name / "search" / f"{rule}-seed-{recipe.seed}.json"


ADDITION, EXPORTED = "addition.json", "exported"
"""What a report of an addition holds beside its metrics; the tag that says where its model lies."""


def addition_folder(recipe: Recipe, modality: str) -> Path:
    """Where the report lies of a modality that was added to an exported model."""
    return Path("reports") / recipe.name / "add" / modality / f"seed-{recipe.seed}"


def compose_folder(recipe_name: str) -> Path:
    """Where the table of a recipe's compositions lies."""
    return Path("reports") / recipe_name / "compose"


def compare_folder(recipe_name: str) -> Path:
    """Where the comparison of a recipe's methods lies."""
    return Path("reports") / recipe_name / "compare"


def data_folder(recipe_name: str) -> Path:
    """Where the contact sheets of a recipe's data lie."""
    return Path("reports") / recipe_name / "data"


def pictures(folder: Path) -> list[Path]:
    """The paths of a report's pictures: the score matrix, the scores over stages."""
    return [folder / "scores.png", folder / "stages.png"]


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object that was written beside a result; empty if it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def finished_reports(recipe_name: str) -> list[Path]:
    """Report folders of a recipe's finished runs, by method, order and seed."""
    root = Path("reports", recipe_name)
    found = [*root.glob("*/seed-*/metrics.json"), *root.glob("*/order-*/seed-*/metrics.json")]
    folders = [path.parent for path in found]
    return sorted(folders, key=lambda folder: (folder.relative_to(root).parts[:-1], _seed(folder)))


def _unusual(recipe: Recipe, usual: Sequence[str]) -> bool:
    return bool(usual) and tuple(usual) != recipe.order


def _seed(folder: Path) -> int:
    return int(folder.name.removeprefix("seed-"))
