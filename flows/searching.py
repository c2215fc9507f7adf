"""Choosing a method's parameters on validation rows; test rows are never looked at."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.running import run_several
from graftline.methods.search import Search, Trial, best_of, search_of, write_trials
from graftline.recipe import load_recipe
from tasks.outputs import search_file

if TYPE_CHECKING:
    from rich.console import Console


def search(
    path: str,
    methods: Sequence[str],
    overrides: Mapping[str, Any],
    console: Console,
    *,
    rates: bool,
) -> list[Path]:
    """Runs every candidate of some methods on the validation split and records which was best.

    Candidates run side by side where slots are free. What was computed before is reused, so a
    search that was stopped goes on.

    Args:
        path: the recipe's file.
        methods: merge rules, rivals, or `finetune`.
        overrides: dotted key -> value, for all runs.
        console: for progress bars.
        rates: search the fine-tuning's learning rate and length.

    Returns:
        The records: `reports/<recipe>/search/<method>-seed-<s>.json`; of rates
        `<method>-rates-seed-<s>.json`.

    Raises:
        GraftlineError: a method has nothing to search, or a run cannot be done.
    """
    recipe = load_recipe(path, overrides)
    searches = [search_of(method, recipe, rates=rates) for method in methods]
    wanted = [(each, candidate) for each in searches for candidate in each.candidates]
    name = f"{recipe.name}-search"
    runs = [{**overrides, "name": name, **each.overrides(candidate)} for each, candidate in wanted]
    trials: dict[str, list[Trial]] = {each.name: [] for each in searches}
    data_md5 = ""
    for (each, candidate), folder in zip(wanted, run_several(path, runs, console), strict=True):
        metrics = json.loads((Path(folder) / "metrics.json").read_text(encoding="utf-8"))
        trials[each.name].append(trial_of(each, candidate, metrics))
        data_md5 = metrics["data_md5"]
    files = []
    for each in searches:
        files.append(search_file(recipe, each.name))
        write_trials(files[-1], each, trials[each.name], recipe, data_md5)
    return files


def trial_of(search: Search, candidate: Mapping[str, Any], metrics: Mapping[str, Any]) -> Trial:
    """What a candidate's run says, by what the search is judged by."""
    scores = metrics["scores" if search.judged_by == "final" else "scores_when_learned"]
    return Trial(candidate, metrics["retention"], scores)


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
    chosen = content["chosen"]
    if content["what"] == "parameters":
        return f"compose: {{parameters: {{{content['rule']}: {json.dumps(chosen)}}}}}"
    if not chosen:
        return "what it says already" if content["what"] == "rates" else "the defaults"
    return "  ".join(f"--set {key}={value}" for key, value in chosen.items())
