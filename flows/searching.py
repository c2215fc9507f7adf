"""Choosing a method's parameters on validation rows; test rows are never looked at."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from flows.running import run_several
from graftline.methods.search import Search, Trial, best_of, search_of, write_trials
from graftline.planning.run import plan_run
from graftline.recipe import Recipe
from graftline.settings.reading import load_recipe, set_dotted
from graftline.stores import open_store
from tasks.outputs import search_file

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Trials:
    """What is to be tried.

    Attributes:
        recipe: what all trials have in common.
        wanted: each search with each of its candidates.
        runs: of each of them, dotted key -> value that wins over the recipe's file.
    """

    recipe: Recipe
    wanted: Sequence[tuple[Search, Mapping[str, Any]]]
    runs: Sequence[Mapping[str, Any]]


def trials_of(
    path: str, methods: Sequence[str], overrides: Mapping[str, Any], *, rates: bool
) -> Trials:
    """Every candidate of some methods, as a run on the validation split.

    Args:
        path: the recipe's file.
        methods: as `search_of` takes them.
        overrides: dotted key -> value, for all runs.
        rates: search the fine-tuning's learning rate and length.

    Raises:
        GraftlineError: a method has nothing to search.
    """
    recipe = load_recipe(path, overrides)
    searches = [search_of(method, recipe, rates=rates) for method in methods]
    wanted = [(each, candidate) for each in searches for candidate in each.candidates]
    name = f"{recipe.name}-search"
    runs = [{**overrides, "name": name, **each.overrides(candidate)} for each, candidate in wanted]
    return Trials(recipe, wanted, runs)


def budget(path: str, trials: Trials) -> str | None:
    """What a search will cost, from its plans and the store; `None` while there are no data."""
    from graftline.planning.budget import budget_of
    from tasks.own_data import whole_data

    data = whole_data(trials.recipe)
    if data is None:
        return None
    plans = [plan_run(load_recipe(path, changes), data.files) for changes in trials.runs]
    return budget_of(plans, open_store(trials.recipe.store, verify="quick")).text()


def search(path: str, trials: Trials, console: Console) -> list[Path]:
    """Runs every candidate and records which was best.

    Candidates run side by side where slots are free. What was computed before is reused, so a
    search that was stopped goes on.

    Args:
        path: the recipe's file.
        trials: from `trials_of`.
        console: for what is said and progress bars.

    Returns:
        The records: `reports/<recipe>/search/<method>-seed-<s>.json`; of rates
        `<method>-rates-seed-<s>.json`.

    Raises:
        GraftlineError: a run cannot be done.
    """

    def announce() -> None:
        known = budget(path, trials) or "data must be built first"
        console.print(known, markup=False, highlight=False, soft_wrap=True)

    found: dict[str, tuple[Search, list[Trial]]] = {}
    data_md5 = ""
    measured = run_several(path, trials.runs, console, announce)
    for (each, candidate), metrics in zip(trials.wanted, measured, strict=True):
        found.setdefault(each.name, (each, []))[1].append(trial_of(each, candidate, metrics))
        data_md5 = metrics["data_md5"]
    files = []
    for each, tried in found.values():
        files.append(search_file(trials.recipe, each.name))
        write_trials(files[-1], each, tried, trials.recipe, data_md5)
    return files


def trial_of(search: Search, candidate: Mapping[str, Any], metrics: Mapping[str, Any]) -> Trial:
    """What a candidate's run says, by what the search is judged by."""
    scores = metrics["scores" if search.judged_by == "final" else "scores_when_learned"]
    return Trial(candidate, metrics["retention"], scores, metrics["fingerprint"])


def describe(file: Path) -> str:
    """What was tried and chosen, and how the recipe takes it over."""
    content = json.loads(file.read_text(encoding="utf-8"))
    trials = [Trial(**trial) for trial in content["trials"]]
    judged = "at the end" if content["judged_by"] == "final" else "of each modality when learned"
    lines = [
        f"{content['rule']}: mean score x 100 {judged}, validation rows, seed {content['seed']}, "
        f"order {', '.join(content['order'])}"
    ]
    for trial in trials:
        mark = "*" if trial == best_of(trials) else " "
        lines.append(f" {mark} {100 * trial.score:6.1f}  {json.dumps(trial.parameters)}")
    lines.append(f"   in the recipe: {_as_recipe(content)}")
    return "\n".join(lines)


def _as_recipe(content: Mapping[str, Any]) -> str:
    chosen, method = content["chosen"], content["rule"]
    if content["what"] == "parameters":
        return _flow({"compose": {"parameters": {method: chosen}}})
    if not chosen:
        return "the defaults"
    nested: dict[str, Any] = {}
    for key, value in chosen.items():
        set_dotted(nested, key, value)
    return _flow({"methods": {method: nested}})


def _flow(content: Mapping[str, Any]) -> str:
    """As YAML on one line."""
    return yaml.safe_dump(content, default_flow_style=True, width=10_000).strip()[1:-1]
