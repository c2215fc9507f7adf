"""What people and other tools read of a run: reports, pictures, MLflow's numbers, artifacts."""

from __future__ import annotations

import logging
import re
import resource
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from graftline.asking.links import links_of
from graftline.asking.parts import parts_of_plan
from graftline.evaluation.pictures import score_matrix, scores_over_stages
from graftline.evaluation.report import (
    COSTS,
    HEADLINE,
    RunScores,
    gains_of,
    place_scores,
    read_report,
    split_scores,
    write_report,
)
from graftline.planning.costs import Costs, Window, busy_seconds, costs_of, seconds_by_step
from graftline.planning.plan import Model, Step
from graftline.planning.run import RunPlan, plan_run
from graftline.steps.results import collect
from graftline.store import Store
from graftline.stores import open_store
from tasks import tracking
from tasks.outputs import EXPORTED, matrix_rows, pictures, read_object
from tasks.references import DataVersion, Place

_log = logging.getLogger(__name__)
_NAMES = {"final": "score", "vanilla": "vanilla", "merged": "merged", "expert": "expert"}


@task(
    name="record-stage",
    task_run_name="record stage {stage}",
    cache_policy=NO_CACHE,
    persist_result=False,
)
def record_stage(plan: RunPlan, stage: int, place: Place, data: DataVersion) -> str | None:
    """Records a finished stage in MLflow: its numbers, its checkpoint; stage 0 are the experts.

    Returns:
        The id of the checkpoint's model in MLflow, if the stage has one.
    """
    if place.tracked is None:
        return None
    run = _collect(_until(plan, stage), place, data, seconds=0.0)
    child = tracking.stage_run(place.tracked, stage)
    numbers = _stage_numbers(run, stage)
    for step, found in numbers.items():
        for run_id in (place.tracked.run_id, child):
            tracking.log_numbers(run_id, place.tracked.uri, found, step)
    model_id = None
    for planned in plan.stages:
        if planned.index == stage:
            model_id = _log_model(plan, planned.final, stage, child, place, numbers[stage])
    tracking.end_run(place.tracked.uri, child, "FINISHED")
    return model_id


@task(name="write-report", cache_policy=NO_CACHE, persist_result=False)
def write_run_report(
    plan: RunPlan,
    place: Place,
    data: DataVersion,
    folder: Path,
    window: Window,
    computed: Collection[Step],
) -> None:
    """Writes `reports/...`: metrics, tables and pictures; and the run's totals to MLflow.

    Args:
        plan: the run.
        place: where its artifacts lie.
        data: the data's version.
        folder: where the report goes.
        window: the run's time so far.
        computed: steps that were computed in it and not found. A report of the same result
            stays as it is when there were none, so that its wall time stays the computation's; what
            an older version did not record is added.
    """
    old = metrics_in(folder)
    store = open_store(place.store)
    if not computed and old.get("fingerprint") == plan.fingerprint:
        metrics = old
        if not (has_costs(old) and old.get("step_seconds") and (folder / HEADLINE).exists()):
            metrics = write_report(folder, _with_costs(read_report(folder), plan, store))
    else:
        settings = None if plan.recorded else _of_seed_0(plan, data)
        _note_replaced(folder, old, settings)
        idle = max(0.0, window.seconds - busy_seconds(computed, store, window))
        run = _with_costs(_collect(plan, place, data, window.seconds), plan, store)
        # Cut short, it leaves none: not new numbers beside old pictures, nor the reverse.
        for path in (folder / "metrics.json", *pictures(folder)):
            path.unlink(missing_ok=True)
        metrics = write_report(folder, replace(run, idle_seconds=idle, settings=settings))
    if not all(path.exists() for path in pictures(folder)) or metrics is not old:
        _draw(folder, _collect(plan, place, data, window.seconds))
    _publish(plan, place, folder, metrics)


@task(name="register-model", cache_policy=NO_CACHE, persist_result=False)
def register_model(
    plan: RunPlan,
    place: Place,
    data: DataVersion,
    model_id: str | None,
    alias: str,
    exported: Path | None = None,
) -> None:
    """Registers the last stage's checkpoint under the recipe's name, and points an alias at it.

    Args:
        plan: the run.
        place: where it was carried out.
        data: the data's version.
        model_id: of the checkpoint in MLflow; None where there is none.
        alias: that is to name it.
        exported: the folder that holds the model, where no recipe alone makes it again.
    """
    if place.tracked is None or model_id is None:
        return
    recipe = plan.recipe
    tags = {
        "method": recipe.method,
        "seed": str(recipe.seed),
        "order": ",".join(recipe.order),
        "data_md5": data.md5,
        "fingerprint": plan.fingerprint,
        **({EXPORTED: str(exported.absolute())} if exported is not None else {}),
    }
    tracking.register(recipe.name, model_id, place.tracked.run_id, alias, tags)


def matrix_markdown(metrics: Mapping[str, Any], table: str) -> str:
    """The score matrix and the headlines of a run as Markdown.

    Args:
        metrics: as `metrics.json` holds them.
        table: the matrix as Markdown.
    """
    lines = [f"# {metrics['recipe']}, {metrics['method']}, seed {metrics['seed']}", "", table, ""]
    for name in ("brg", "frg", "retention"):
        value = metrics.get(name)
        lines.append(f"- **{name.upper()}**: {'n/a' if value is None else f'{value:.2f} %'}")
    return "\n".join(lines) + "\n"


def _note_replaced(folder: Path, old: Mapping[str, Any], settings: str | None) -> None:
    """Says so where a run's report takes the place of one with other settings, data or code."""
    if old.get("settings") not in (None, settings):
        _log.warning(
            "%s: takes the place of a report with other settings, data or code; "
            "--set name=... keeps both", folder,
        )  # fmt: skip


def _of_seed_0(plan: RunPlan, data: DataVersion) -> str:
    """What runs have in common that differ by their seed alone."""
    return plan_run(plan.recipe.model_copy(update={"seed": 0}), data.files).fingerprint


def _until(plan: RunPlan, stage: int) -> RunPlan:
    """The part of a plan that is finished at a stage's end."""
    if stage == 0:
        return replace(plan, perplexity={})
    scores = tuple(s for s in plan.scores if s.point != "expert" and s.stage <= stage)
    return replace(plan, scores=scores, perplexity={})


def _collect(plan: RunPlan, place: Place, data: DataVersion, seconds: float) -> RunScores:
    return collect(
        plan if plan.stages else _kept_apart(plan),
        open_store(place.store),
        wall_seconds=seconds,
        peak_rss_bytes=_peak_bytes(),
        data_md5=data.md5,
    )


def _with_costs(run: RunScores, plan: RunPlan, store: Store) -> RunScores:
    costs = asdict(costs_of(plan, store))
    return replace(run, **costs, step_seconds=seconds_by_step(plan, store))


def _kept_apart(plan: RunPlan) -> RunPlan:
    """Experts alone: what is delivered at the end is each modality's own expert."""
    last = len(plan.recipe.order)
    final = tuple(
        replace(score, stage=last, stage_modality=plan.recipe.order[-1], point="final")
        for score in plan.scores
        if score.point == "expert"
    )
    return replace(plan, scores=(*plan.scores, *final))


def _peak_bytes() -> int:
    """Largest resident memory of this process so far (Linux counts in KiB, macOS in bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _stage_numbers(run: RunScores, stage: int) -> dict[int, dict[str, float]]:
    """MLflow step -> name -> number, of one stage; an expert's step is its modality's stage."""
    numbers: dict[int, dict[str, float]] = {stage: {}} if stage else {}
    for (point, at, modality), score in place_scores(run).items():
        if at == stage:
            step = stage or run.order.index(modality) + 1
            numbers.setdefault(step, {})[f"{_NAMES[point]}.{modality}"] = score
    for cell in run.cells:
        if cell.place[1] == stage:
            step = stage or run.order.index(cell.modality) + 1
            numbers[step][f"{_NAMES[cell.point]}.{cell.modality}.{cell.task}"] = cell.score
    if stage:
        gains = gains_of(place_scores(run), run.order[:stage])  # as if the run ended here
        for name, gain in (("BRG", gains.brg), ("FRG", gains.frg_per_stage[stage])):
            if gain.value is not None:
                numbers[stage][name] = gain.value
    return numbers


def _log_model(
    plan: RunPlan,
    model: Model,
    stage: int,
    child: str,
    place: Place,
    numbers: Mapping[str, float],
) -> str:
    assert place.tracked is not None
    store, recipe = open_store(place.store), plan.recipe
    parts = {"backbone": model.backbone} | {
        f"connector.{name}": reference for name, reference in model.connectors.items()
    }
    tags = {role: f"{part.kind}/{part.fingerprint}" for role, part in parts.items()}
    tags |= {"method": recipe.method, "seed": str(recipe.seed), "stage": str(stage)}
    where = store.location(model.backbone.kind, model.backbone.fingerprint)
    name = f"{recipe.name}-{recipe.method}-stage-{stage}".replace(".", "-")
    last = stage == plan.stages[-1].index
    links = links_of(parts_of_plan(plan, store)) if last else None
    return tracking.log_model(place.tracked, child, name, where, tags, numbers, stage, links)


def _draw(folder: Path, run: RunScores) -> None:
    stages, vanilla, experts = split_scores(place_scores(run), run.order)
    matrix, lines = pictures(folder)
    title = f"{run.recipe}: {run.method}, seed {run.seed}"
    score_matrix(matrix, run.order, stages, vanilla=vanilla, experts=experts, title=title)
    scores_over_stages(lines, run.order, stages, vanilla=vanilla, experts=experts, title=title)


def _publish(plan: RunPlan, place: Place, folder: Path, metrics: Mapping[str, Any]) -> None:
    """The report's numbers and files to MLflow, its matrix to Prefect."""
    text = matrix_markdown(metrics, _matrix_table(folder, metrics["order"]))
    if place.tracked is not None:
        names = {"brg": "BRG.final", "frg": "FRG.mean"} | {
            key: key
            for key in (
                "brg_mean", "retention", "text_perplexity_before", "text_perplexity_after",
                "wall_seconds", "computing_seconds", "peak_rss_bytes", "joint", *COSTS,
            )
        }  # fmt: skip
        found = {n: float(metrics[k]) for k, n in names.items() if metrics.get(k) is not None}
        run_id, uri = place.tracked.run_id, place.tracked.uri
        tracking.log_numbers(run_id, uri, found, len(plan.recipe.order))
        small = ["metrics.json", "scores.csv", "scores.png", "stages.png"]
        tracking.log_files(place.tracked, [folder / name for name in small])
        text += f"\nMLflow: experiment `{plan.recipe.name}`, run `{run_id}`"
        if uri.startswith("http"):
            link = f"{uri.rstrip('/')}/#/experiments/{place.tracked.experiment_id}/runs/{run_id}"
            text += f" ([open]({link}))"
    key = re.sub(r"[^a-z0-9]+", "-", f"scores-{plan.recipe.name}-{plan.recipe.method}".lower())
    create_markdown_artifact(key=key.strip("-"), markdown=text, description="score matrix")


def _matrix_table(folder: Path, order: Sequence[str]) -> str:
    """A report's score matrix as a Markdown table, scores x 100."""
    lines = ["| | " + " | ".join(name.replace("_", " ") for name in order) + " |"]
    lines.append("|" + " --- |" * (len(order) + 1))
    for label, scores in matrix_rows(folder):
        fields = [f"{100 * scores[name]:.1f}" if name in scores else "" for name in order]
        lines.append(f"| {label} | " + " | ".join(fields) + " |")
    return "\n".join(lines)


def metrics_in(folder: Path) -> dict[str, Any]:
    """What a report's `metrics.json` holds; nothing if there is none."""
    return read_object(folder / "metrics.json")


def has_costs(metrics: Mapping[str, Any]) -> bool:
    """Whether a report holds the costs that this version derives from artifacts."""
    return all(metrics.get(field.name) is not None for field in fields(Costs))
