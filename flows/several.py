"""Several runs at once: their steps side by side, each run reported when its steps are there."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from prefect import flow

from flows.continual import opened_run, run_once
from flows.data import versioned
from flows.dispatch import compute_lacking
from graftline.planning.plan import Step
from graftline.planning.problems import require_possible
from graftline.planning.run import RunPlan, plan_run
from graftline.settings.reading import load_recipe
from graftline.steps.work import Machine
from graftline.stores import open_store
from tasks.outputs import report_folder, run_name, usual_order
from tasks.preflight import check_disk, check_folders
from tasks.references import DataVersion, Place
from tasks.report import metrics_in


@flow(name="several", persist_result=False, validate_parameters=False)
def several(recipe_path: str, runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Runs a recipe several times, each time with other keys.

    Args:
        recipe_path: `params/*.yaml`.
        runs: of each, dotted key -> value; wins over the file. All have the same store and data;
            where several report into one folder, the last one's report stays.

    Returns:
        The metrics of each run.
    """
    recipes = [load_recipe(recipe_path, changes) for changes in runs]
    folders = [report_folder(recipe, usual_order(recipe_path)) for recipe in recipes]
    with opened_run(recipes[0], folders[0]):
        data = versioned(recipes[0], recipes)
        plans = [plan_run(recipe, data.files) for recipe in recipes]
        metrics: list[dict[str, Any]] = [{} for _ in runs]

        def keep(number: int) -> None:
            metrics[number] = metrics_in(folders[number])

        run_all(recipe_path, list(zip(runs, plans, strict=True)), data, keep)
    return metrics


def run_all(
    recipe_path: str,
    runs: Sequence[tuple[Mapping[str, Any], RunPlan]],
    data: DataVersion,
    reported: Callable[[int], None] = lambda _: None,
) -> None:
    """Computes what runs lack in all slots, and has `continual` report each that lacks nothing.

    A method's chain of fine-tunings keeps one slot busy: what the next run lacks fills the others.

    Args:
        recipe_path: `params/*.yaml`.
        runs: what each changes of the recipe, and its plan; what an earlier one lacks comes first.
        data: the data's version.
        reported: is told the number of each run, from 0, when its report is written.
    """
    usual, plans = usual_order(recipe_path), [plan for _, plan in runs]
    if not plans:
        return
    first = plans[0].recipe
    for plan in plans:
        require_possible(plan.recipe, data.files)
        check_folders(plan.recipe, report_folder(plan.recipe, usual))
    if first.execution.where == "here":
        steps = {name: step for plan in plans for name, step in plan.steps.items()}
        check_disk(replace(plans[0], steps=steps), open_store(first.store))
    started = time.time()

    def report(number: int, computed: Sequence[Step]) -> None:
        # a run's time is what went by since the report before it began
        nonlocal started
        ended, (changes, plan) = time.time(), runs[number]
        title = f"{plan.recipe.name} {run_name(plan.recipe, usual)}"

        @flow(name="continual", flow_run_name=title, persist_result=False)
        def one_of_them(recipe_path: str, overrides: Mapping[str, Any]) -> None:
            run_once(recipe_path, overrides, started, ended, computed)

        one_of_them(recipe_path, changes)
        started = ended
        reported(number)

    compute_lacking(plans, Place(first.store, Machine.of(first)), data, report)
