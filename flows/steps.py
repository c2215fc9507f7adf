"""Steps of somebody's run, carried out by a worker: what `execution.where: workers` sends out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from prefect import flow

from graftline.errors import GraftlineError
from graftline.planning.run import RunPlan, plan_run
from graftline.recipe import Recipe
from graftline.steps.work import Machine
from graftline.stores import open_store
from tasks.references import Place
from tasks.steps import TASKS, feature_share


@flow(name="steps", persist_result=False, validate_parameters=False)
def steps(
    recipe: Mapping[str, Any],
    common: Mapping[str, Any],
    data_files: Mapping[str, Mapping[str, str]],
    references: Sequence[str],
    share: int = 0,
) -> None:
    """Carries out some steps of a run, one after another; the store has their inputs.

    Args:
        recipe: the run's whole recipe, as plain data.
        common: the same without its method's own settings, as all methods share it.
        data_files: modality, then split, then md5 of its file: with the recipe they make the plan.
        references: which steps, as `<kind>/<fingerprint>`, parents before children.
        share: of a step `features`, this share alone, from 1; 0: whole steps.

    Raises:
        GraftlineError: this machine plans other steps than the run's, or one of them fails.
    """
    plan = plan_of(recipe, common, data_files)
    chosen = plan.recipe
    known = {f"{each.kind}/{each.fingerprint}": step for each, step in plan.steps.items()}
    missing = [name for name in references if name not in known]
    if missing:
        raise GraftlineError(
            f"{missing[0]}: the plan that this machine makes of the recipe has no such step; it "
            "has another version of graftline than the machine on which the run was started. "
            "Update both and run again."
        )
    # Numbers are recorded by the run that waits for these steps.
    open_store(chosen.store).sweep()  # what killed steps left here, and copies above the limit
    place = Place(chosen.store, replace(Machine.of(chosen), slots=1))
    if share:
        feature_share(known[references[0]], place, share)
        return
    for name in references:
        TASKS[known[name].kind](known[name], place)


def plan_of(
    recipe: Mapping[str, Any],
    common: Mapping[str, Any],
    data_files: Mapping[str, Mapping[str, str]],
) -> RunPlan:
    """The plan of a run from what was sent of it; the arguments are those of `steps`."""
    chosen = Recipe.model_validate(recipe).beside(Recipe.model_validate(common))
    return plan_run(chosen, data_files)
