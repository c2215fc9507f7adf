"""The main flow: one modality after another, by the recipe's method."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.runtime import flow_run

from flows.data import versioned
from flows.dispatch import carry_out_jobs, step_job
from flows.slots import Job
from graftline.planning.costs import Window
from graftline.planning.plan import Step, is_done
from graftline.planning.problems import require_possible
from graftline.planning.run import RunPlan, plan_run
from graftline.recipe import Recipe
from graftline.settings.reading import load_recipe
from graftline.steps.work import Machine
from graftline.stores import open_store
from tasks.dispatch import check_machines
from tasks.interruption import closed_when_stopped
from tasks.outputs import model_alias, report_folder, run_name, usual_order
from tasks.preflight import check_disk, check_folders
from tasks.records import RunRecord, recorded_run
from tasks.references import DataVersion, Place
from tasks.report import record_stage, register_model, write_run_report
from tasks.stale import close_dead_runs, close_lost_runs, close_own_run
from tasks.steps import by_stage, note_done, note_reused, scores_of_stage, unfinished
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
    return run_once(recipe_path, overrides, time.time())


def run_once(
    recipe_path: str,
    overrides: Mapping[str, Any] | None,
    started: float,
    ended: float | None = None,
    beside: Collection[Step] = (),
) -> str:
    """What `continual` does.

    Args:
        recipe_path: `params/*.yaml`.
        overrides: dotted key -> value; wins over the file.
        started: when its time began, in seconds since the epoch.
        ended: when it ended, if its steps were computed before; else it ends with the last one.
        beside: steps that were computed in it before this, for whichever run.

    Returns:
        The report's folder.
    """
    recipe = load_recipe(recipe_path, overrides)
    usual = usual_order(recipe_path)
    folder = report_folder(recipe, usual)
    with opened_run(recipe, folder) as record:
        data = versioned(recipe, [recipe])
        require_possible(recipe, data.files)
        plan = plan_run(recipe, data.files)

        def finish(place: Place, model_id: str | None) -> None:
            register_model(plan, place, data, model_id, model_alias(recipe, usual))

        name = run_name(recipe, usual)
        carry_out_run(plan, data, folder, name, record, started, finish, ended, beside)
    return str(folder)


@contextmanager
def opened_run(recipe: Recipe, folder: Path) -> Iterator[RunRecord]:
    """A run of this process while the context lasts; what dead runs left behind is closed first.

    Args:
        recipe: what is run.
        folder: where its report goes.

    Raises:
        GraftlineError: a folder cannot be written, or a machine is not there that the recipe needs.
    """
    check_folders(recipe, folder)
    check_machines(recipe)
    close_dead_runs(recipe.store)
    close_lost_runs(recipe.name)
    open_store(recipe.store).sweep()
    with (
        recorded_run(recipe.store) as record,
        closed_when_stopped(lambda: close_own_run(record)),
    ):
        record.note(prefect_flow_run=str(flow_run.id))
        yield record


def carry_out_run(
    plan: RunPlan,
    data: DataVersion,
    folder: Path,
    name: str,
    record: RunRecord,
    started: float,
    finish: Callable[[Place, str | None], None],
    ended: float | None = None,
    beside: Collection[Step] = (),
) -> None:
    """Carries a plan out under a run of its own in MLflow, and writes its report.

    Args:
        plan: the run.
        data: the data's version.
        folder: where the report goes.
        name: of the run in MLflow.
        record: of this process's run.
        started: when it began, in seconds since the epoch.
        finish: what is done last, with the id in MLflow of the last stage's model.
        ended: as for `run_once`.
        beside: as for `run_once`.
    """
    recipe = plan.recipe
    if recipe.execution.where == "here":
        check_disk(plan, open_store(recipe.store))
    tags = {"prefect_flow_run_id": str(flow_run.id), "prefect_url": str(flow_run.ui_url)}
    with tracked_run(recipe, name, plan.fingerprint, data, tags) as tracked:
        record.note(mlflow_uri=tracked.uri, mlflow_run=tracked.run_id)
        place = Place(recipe.store, Machine.of(recipe), tracked)
        computed = [*beside, *unfinished(plan, open_store(recipe.store))]
        model_id = carry_out_stages(plan, place, data, beside)
        window = Window(started, ended or time.time())
        write_run_report(plan, place, data, folder, window, computed)
        finish(place, model_id)
        tag_run(tracked, {"report": str(folder)})


def carry_out_stages(
    plan: RunPlan, place: Place, data: DataVersion, beside: Collection[Step] = ()
) -> str | None:
    """Carries out every step, the stages' before the experts', and records each stage's scores.

    What is finished is no task run: it is noted in MLflow at once, and takes no slot.

    Args:
        plan: the run.
        place: where.
        data: the data's version.
        beside: steps that were computed for it and others just before.

    Returns:
        The id in MLflow of the last stage's model.
    """
    jobs: list[Job] = []
    recipes: dict[Hashable, Recipe] = {}
    records: list[str] = []
    store, reused = open_store(place.store), set()
    fresh = {step.reference for step in beside}
    for stage, steps in by_stage(plan):
        for step in steps:
            if is_done(step, store):
                (note_done if step.reference in fresh else note_reused)(step, place)
                reused.add(step.reference)
                continue
            parents = tuple(p for p in step.parents.values() if p not in reused)
            jobs.append(step_job(step, place, parents))
            recipes[step.reference] = plan.recipe
        scores = (score.reference for score in scores_of_stage(plan, stage))
        measured = [reference for reference in scores if reference not in reused]
        arguments = {"plan": plan, "stage": stage, "place": place, "data": data}
        jobs.append(Job(f"stage {stage}", record_stage, arguments, (*records[-1:], *measured)))
        records.append(f"stage {stage}")
    futures = carry_out_jobs([jobs], recipes, plan.recipe.execution, place, data)
    models = [futures[name].result() for name in records]
    return next((model for model in reversed(models) if model is not None), None)
