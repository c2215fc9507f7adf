"""Methods side by side: runs of `continual` over orders and seeds, then their comparison."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefect import flow

from flows.continual import opened_run
from flows.data import versioned
from flows.several import run_all
from graftline.planning.budget import plans_of
from graftline.planning.comparison import BASELINE, WantedRun, comparison_of
from graftline.planning.plan import Reference
from graftline.planning.run import RunPlan
from graftline.settings.reading import load_recipe
from tasks.comparing import (
    comparison_tags,
    is_finished,
    record_comparison,
    reported_runs,
    reports_of,
    require_same_data,
    write_comparison,
)
from tasks.outputs import compare_folder, report_folder, run_name, usual_order
from tasks.references import DataVersion
from tasks.tracking import comparison_run

_log = logging.getLogger("tasks.comparing")


@flow(name="compare", persist_result=False, validate_parameters=False)
def compare(
    recipe_path: str,
    methods: Sequence[str] = (),
    seeds: str = "0",
    orders: str = "default",
    order_seeds: str | None = None,
    also: Sequence[str] = (),
    trust_reports: bool = False,
    overrides: Mapping[str, Any] | None = None,
    out: str | None = None,
) -> str:
    """Runs what a comparison still lacks, and compares.

    Stages that runs share are computed once; finished runs are not run again.

    Args:
        recipe_path: `params/*.yaml`.
        methods: names of methods; every continual one if empty.
        seeds: numbers with commas between them.
        orders: `default`, `latin`, `all` or a list; see `graftline.planning.comparison`.
        order_seeds: the seeds of other orders than the recipe's; the same if `None`.
        also: names of other recipes whose finished reports come beside, if they have all runs.
        trust_reports: a run whose report is of this very plan is finished, even if its artifacts
            are not in the store.
        overrides: dotted key -> value, for all runs; wins over the file.
        out: the comparison's folder; `reports/<recipe>/compare` if `None`.

    Returns:
        The comparison's folder.
    """
    recipe = load_recipe(recipe_path, overrides)
    wanted = comparison_of(recipe.order, methods, seeds, orders, order_seeds)
    others = {
        label: paths for name in also for label, paths in reports_of(name, wanted.places).items()
    }
    folder = compare_folder(recipe.name) if out is None else Path(out)
    with opened_run(recipe, folder) as record:
        runs = [load_recipe(recipe_path, run.changes(overrides or {})) for run in wanted.runs()]
        data = versioned(recipe, runs)
        plans = plans_of(recipe_path, wanted, overrides or {}, data.files)
        usual = usual_order(recipe_path)
        require_same_data(others, data, [report_folder(plan.recipe, usual) for _, plan in plans])
        groups = _finished(recipe_path, plans, overrides or {}, data, trust_reports)
        baseline = BASELINE if BASELINE in groups else None
        found = write_comparison(recipe.name, {**groups, **others}, baseline, folder)
        title = f"comparison of {len(found.methods)} methods"
        with comparison_run(recipe.name, title, comparison_tags(found)) as tracked:
            if tracked is not None:
                record.note(mlflow_uri=tracked.uri, mlflow_run=tracked.run_id)
                record_comparison(found, tracked, folder)
    return str(folder)


def _finished(
    recipe_path: str,
    plans: Sequence[tuple[WantedRun, RunPlan]],
    overrides: Mapping[str, Any],
    data: DataVersion,
    trust_reports: bool,
) -> dict[str, list[Path]]:
    """Runs what is not finished; method -> the reports of its runs."""
    usual = usual_order(recipe_path)
    reported = reported_runs(plans, usual) if trust_reports else set()
    groups: dict[str, list[Path]] = {}
    lacking: list[tuple[Mapping[str, Any], RunPlan]] = []
    done: set[Reference] = set()
    for run, plan in plans:
        report = report_folder(plan.recipe, usual)
        groups.setdefault(run.method, []).append(report)
        if run in reported or is_finished(plan, report, done):
            _log.info("%s: finished before", run_name(plan.recipe, usual))
        else:
            lacking.append((run.changes(overrides), plan))
    run_all(recipe_path, lacking, data)
    return groups
