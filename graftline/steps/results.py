"""The scores of a run, read from its artifacts alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from graftline.errors import GraftlineError
from graftline.evaluation.cells import ScoreCell
from graftline.evaluation.report import RunScores
from graftline.evaluation.scoring import METRICS
from graftline.planning.costs import seconds_of
from graftline.planning.plan import Reference
from graftline.planning.run import PlannedScore, RunPlan
from graftline.store import Artifact, Store
from graftline.weight_files import read_header

_MERGES = ("merge", "weighted-merge", "compose")


def collect(
    plan: RunPlan, store: Store, *, wall_seconds: float, peak_rss_bytes: int, data_md5: str
) -> RunScores:
    """Gathers what a finished run measured.

    Args:
        plan: the run, or the part of it that is finished.
        store: where its artifacts are.
        wall_seconds: how long the run took.
        peak_rss_bytes: the most memory it held.
        data_md5: the data's version.

    Raises:
        GraftlineError: a score is not in the store yet.
    """
    tables: dict[Reference, dict[str, list[float]]] = {}
    cells = list(plan.recorded)
    for planned in plan.scores:
        if planned.reference not in tables:
            tables[planned.reference] = _by_task(_found(store, planned.reference))
        cells += _cells(planned, tables[planned.reference])
    perplexity = {
        when: _perplexity(store, reference) for when, reference in plan.perplexity.items()
    }
    recipe = plan.recipe
    return RunScores(
        recipe=recipe.name,
        method=recipe.method,
        seed=recipe.seed,
        order=recipe.order,
        cells=tuple(cells),
        wall_seconds=wall_seconds,
        computing_seconds=seconds_of(plan.steps.values(), store),
        merging_seconds=seconds_of(
            (step for step in plan.steps.values() if step.kind in _MERGES),
            store,
        ),
        storage_bits=_storage_bits(plan, store),
        peak_rss_bytes=peak_rss_bytes,
        data_md5=data_md5,
        fingerprint=plan.fingerprint,
        text_perplexity_before=perplexity.get("before"),
        text_perplexity_after=perplexity.get("after"),
    )


def _found(store: Store, reference: Reference) -> Artifact:
    artifact = store.find(reference.kind, reference.fingerprint)
    if artifact is None:
        raise GraftlineError(
            f"{reference.kind} {reference.fingerprint[:12]} is not in the store; run the recipe."
        )
    return artifact


def _storage_bits(plan: RunPlan, store: Store) -> float | None:
    """What the last model's backbones take on the disk, in bits a parameter of one backbone.

    All weights and masks that answering needs, connectors aside: 16 for one backbone in bf16,
    16 + 16 + N with N masks, 16 + 16 N with N experts, 16 and a few with adapters. None while a
    part is not there.
    """
    if not plan.stages:
        return None
    last = plan.stages[-1].final
    parts = {last.backbone, *last.experts.values(), *last.adapters.values()}
    parts |= {last.base} if last.base else set()
    folders = {part: store.local(part.kind, part.fingerprint) / "backbone" for part in parts}
    if not all(folder.exists() for folder in folders.values()):
        return None
    files = (file for folder in folders.values() for file in folder.rglob("*.safetensors"))
    own = folders[last.backbone].glob("*.safetensors")
    parameters = sum(entry.elements for file in own for entry in read_header(file).values())
    return sum(_bits(file) for file in files) / parameters


def _bits(file: Path) -> int:
    return 8 * sum(entry.size for entry in read_header(file).values())


def _by_task(artifact: Artifact) -> dict[str, list[float]]:
    rows: list[Mapping[str, Any]] = pq.read_table(artifact.folder / "answers.parquet").to_pylist()
    tasks: dict[str, list[float]] = {}
    for row in rows:
        tasks.setdefault(row["task"], []).append(row["score"])
    return tasks


def _cells(planned: PlannedScore, tasks: Mapping[str, list[float]]) -> list[ScoreCell]:
    return [
        ScoreCell(
            stage=planned.stage,
            stage_modality=planned.stage_modality,
            modality=planned.modality,
            task=task,
            point=planned.point,
            metric=METRICS[task],
            examples=tuple(examples),
        )
        for task, examples in sorted(tasks.items())
    ]


def _perplexity(store: Store, reference: Reference) -> float:
    content = json.loads((_found(store, reference).folder / "perplexity.json").read_text("utf-8"))
    return float(content["perplexity"])
