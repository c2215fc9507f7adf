"""Choosing a merge rule's parameters on validation rows; test rows are never looked at."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.running import run_recipes
from graftline.methods.search import Trial, best_of, candidates, write_trials
from graftline.recipe import load_recipe
from tasks.outputs import search_file

if TYPE_CHECKING:
    from rich.console import Console


def search(
    path: str, rules: Sequence[str], overrides: Mapping[str, Any], console: Console
) -> list[Path]:
    """Runs every candidate of some rules on the validation split and records which was best.

    What was computed before is reused, so a search that was stopped goes on.

    Args:
        path: the recipe's file.
        rules: merge rules.
        overrides: dotted key -> value, for all runs.
        console: for progress bars.

    Returns:
        The records: `reports/<recipe>/search/<rule>-seed-<s>.json`.

    Raises:
        GraftlineError: a rule has nothing to search, or a run cannot be done.
    """
    recipe = load_recipe(path, overrides)
    wanted = [(rule, dict(each)) for rule in rules for each in candidates(rule)]
    runs = [
        {
            **overrides,
            "name": f"{recipe.name}-search",
            "method": rule,
            "evaluation.split": "validation",
            f"compose.parameters.{rule}": parameters,
        }
        for rule, parameters in wanted
    ]
    trials: dict[str, list[Trial]] = {rule: [] for rule in rules}
    data_md5 = ""
    for (rule, parameters), folder in zip(wanted, run_recipes(path, runs, console), strict=True):
        metrics = json.loads((Path(folder) / "metrics.json").read_text(encoding="utf-8"))
        trials[rule].append(Trial(parameters, metrics["retention"], metrics["scores"]))
        data_md5 = metrics["data_md5"]
    files = []
    for rule, found in trials.items():
        files.append(search_file(recipe, rule))
        write_trials(files[-1], rule, found, recipe.seed, data_md5)
    return files


def describe(file: Path) -> str:
    """What was tried and chosen, and how the recipe takes it over."""
    content = json.loads(file.read_text(encoding="utf-8"))
    trials = [Trial(**trial) for trial in content["trials"]]
    lines = [f"{content['rule']}: mean score x 100 on validation rows, seed {content['seed']}"]
    for trial in trials:
        mark = "*" if trial == best_of(trials) else " "
        lines.append(f" {mark} {100 * trial.score:6.1f}  {json.dumps(trial.parameters)}")
    chosen = json.dumps(content["chosen"])
    lines.append(f"   in the recipe: compose: {{parameters: {{{content['rule']}: {chosen}}}}}")
    return "\n".join(lines)
