"""Where a run's outputs lie, and what is read of them; imports nothing heavy."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from graftline.errors import GraftlineError
from graftline.settings.type_problems import nearest

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


def comparison_files(folder: Path) -> list[Path]:
    """What there is of a comparison in its folder."""
    names = ("frontier.png", "orders.png", "page.html", "stages.png", "table.csv", "table.md")
    return [folder / name for name in names if (folder / name).is_file()]


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


def read_metrics(folder: Path) -> dict[str, Any]:
    """What a finished run's report holds.

    Args:
        folder: the report.

    Raises:
        GraftlineError: `metrics.json` is damaged, or of something else.
    """
    file = folder / "metrics.json"
    metrics = read_object(file)
    if missing := [key for key in ("recipe", "method", "seed", "order") if key not in metrics]:
        raise GraftlineError(
            f"{file}: is not readable as a report (no {', '.join(missing)}); restore it, or move "
            "the folder away and run the recipe again"
        )
    return metrics


def matrix_rows(folder: Path) -> list[tuple[str, dict[str, float]]]:
    """The score matrix of a report: each stage, then the vanilla models and the experts.

    Args:
        folder: the report.

    Returns:
        (label, modality -> mean over its tasks) of each row.

    Raises:
        OSError: `scores.csv` cannot be read.
        KeyError: it lacks a column.
        TypeError: a field is missing in one of its lines.
        ValueError: a stage or a score is no number.
    """
    found: dict[tuple[str, int], dict[str, list[float]]] = {}
    with (folder / "scores.csv").open(encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            stage = int(row["stage"]) if row["point"] == "final" else 0
            scores = found.setdefault((row["point"], stage), {})
            scores.setdefault(row["modality"], []).append(float(row["score"]))
    means = {
        place: {name: sum(values) / len(values) for name, values in scores.items()}
        for place, scores in found.items()
    }
    rows = [(f"after stage {place[1]}", means[place]) for place in sorted(means) if place[1]]
    return rows + [(name, means[name, 0]) for name in ("vanilla", "expert") if (name, 0) in means]


def finished_reports(recipe_name: str) -> list[Path]:
    """Report folders of a recipe's finished runs, by method, order and seed."""
    root = Path("reports", recipe_name)
    found = [*root.glob("*/seed-*/metrics.json"), *root.glob("*/order-*/seed-*/metrics.json")]
    folders = [path.parent for path in found if re.fullmatch(r"seed-[0-9]+", path.parent.name)]
    return sorted(folders, key=lambda folder: (folder.relative_to(root).parts[:-1], _seed(folder)))


def reports_also(recipe_name: str) -> list[Path]:
    """Report folders of another recipe, whose rows `--also` sets beside a recipe's own.

    Raises:
        GraftlineError: none of its runs is finished; says whose name is near.
    """
    folders = finished_reports(recipe_name)
    if not folders:
        known = [path.name for path in Path("reports").glob("*") if finished_reports(path.name)]
        raise GraftlineError(
            f"--also {recipe_name}: no run is finished under reports/{recipe_name}"
            f"{nearest(recipe_name, known) or '; give the name of a recipe that was run'}"
        )
    return folders


def _unusual(recipe: Recipe, usual: Sequence[str]) -> bool:
    return bool(usual) and tuple(usual) != recipe.order


def _seed(folder: Path) -> int:
    return int(folder.name.removeprefix("seed-"))
