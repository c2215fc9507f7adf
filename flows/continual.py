"""The main flow: one modality after another, by the recipe's method."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from prefect import flow
from prefect.futures import PrefectFuture
from prefect.runtime import flow_run
from prefect.task_runners import ThreadPoolTaskRunner

from flows.data import version_data
from graftline.plan import Reference
from graftline.recipe import load_recipe
from graftline.run_plan import RunPlan, plan_run
from graftline.store import Store
from tasks.interruption import closed_when_stopped
from tasks.preflight import check_disk, check_folders
from tasks.records import recorded_run
from tasks.references import DataVersion, Place
from tasks.report import record_stage, register_model, write_run_report
from tasks.stale import close_dead_runs, close_own_run
from tasks.steps import TASKS, by_stage, scores_of_stage, unfinished
from tasks.tracking import tag_run, tracked_run


@flow(name="continual", persist_result=False, validate_parameters=False)
def continual(recipe_path: str, overrides: Mapping[str, Any] | None = None) -> str:
    """Runs a recipe: versions the data, carries out every step, measures and reports.

    Args:
        recipe_path: `params/*.yaml`.
        overrides: dotted key -> value; wins over the file.

    Returns:
        The report's folder.
    """
    recipe = load_recipe(recipe_path, overrides)
    check_folders(recipe)
    close_dead_runs(recipe.store)
    Store(recipe.store).sweep()
    started = time.monotonic()
    with (
        recorded_run(recipe.store) as record,
        closed_when_stopped(lambda: close_own_run(record)),
    ):
        flow_id = str(flow_run.id)
        record.note(prefect_flow_run=flow_id)
        data = version_data(recipe.data.folder, recipe.store)
        plan = plan_run(recipe, data.files)
        check_disk(plan, Store(recipe.store))
        tags = {"prefect_flow_run_id": flow_id, "prefect_url": str(flow_run.ui_url)}
        with tracked_run(recipe, plan.fingerprint, data, tags) as tracked:
            record.note(mlflow_uri=tracked.uri, mlflow_run=tracked.run_id)
            place = Place(recipe.store, recipe.data.folder, recipe.execution.device, tracked)
            computed = unfinished(plan, Store(recipe.store))
            model_id = carry_out_stages(plan, place, data)
            seconds = time.monotonic() - started
            folder = write_run_report(plan, place, data, seconds, computed)
            register_model(plan, place, data, model_id)
            tag_run(tracked, {"report": folder})
    return folder


def carry_out_stages(plan: RunPlan, place: Place, data: DataVersion) -> str | None:
    """Submits every step in an order that finishes stage after stage, and waits for all.

    Returns:
        The id in MLflow of the last stage's model.
    """
    futures: dict[Reference, PrefectFuture[Any]] = {}
    records: list[PrefectFuture[str | None]] = []
    submitted: list[PrefectFuture[Any]] = []
    with ThreadPoolTaskRunner(max_workers=plan.recipe.execution.slots) as slots:
        for stage, steps in by_stage(plan):
            for step in steps:
                parents = [futures[parent] for parent in step.parents.values()]
                futures[step.reference] = slots.submit(
                    TASKS[step.kind], {"step": step, "place": place}, wait_for=parents
                )
                submitted.append(futures[step.reference])
            measured = [futures[score.reference] for score in scores_of_stage(plan, stage)]
            records.append(
                slots.submit(
                    record_stage,
                    {"plan": plan, "stage": stage, "place": place, "data": data},
                    wait_for=[*(records[-1:]), *measured],
                )
            )
            submitted.append(records[-1])
        for future in submitted:  # the first failure ends the run; what waits is not started
            future.result()
        models = [record.result() for record in records]
    return next((model for model in reversed(models) if model is not None), None)
