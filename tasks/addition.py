"""What is left of adding a modality: the new model in a folder of its own, and what it kept."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from graftline.asking.bundle import Description, describe_encoders, write_bundle
from graftline.asking.card import model_card
from graftline.asking.parts import Parts, parts_of_plan
from graftline.durable import atomic_write_text
from graftline.evaluation.report import read_report
from graftline.exchange.adding import Addition
from graftline.stores import open_store
from tasks.outputs import ADDITION
from tasks.references import DataVersion
from tasks.report import metrics_in


@task(name="export-addition", cache_policy=NO_CACHE, persist_result=False)
def export_addition(addition: Addition, data: DataVersion, report: Path, out: Path) -> None:
    """Writes the new model's folder, and beside the report what was kept and what was not done.

    Args:
        addition: the finished stage.
        data: the data's version.
        report: its report.
        out: folder to make.

    Raises:
        GraftlineError: a part is missing, or the folder is there or cannot be written.
    """
    parts = parts_of_plan(addition.plan, open_store(addition.plan.recipe.store))
    metrics = metrics_in(report)
    kept = _kept(addition, metrics["scores"])
    description = _described(addition, data, parts)
    card = model_card(description, {**metrics, "kept": kept["kept"]})
    write_bundle(parts, description, card, out, addition.measured(read_report(report).cells))
    atomic_write_text(report / ADDITION, json.dumps(kept, indent=2) + "\n")


def _kept(addition: Addition, scores: Mapping[str, float]) -> dict[str, Any]:
    """What `addition.json` holds."""
    gain = addition.kept(scores)
    return {
        "grown_from": addition.digest,
        "modality": addition.modality,
        "stage": addition.stage,
        "before": dict(addition.before),
        "after": {name: scores[name] for name in addition.before},
        "kept": gain.value,
        "undefined": gain.reason,
        "not_realigned": dict(addition.not_realigned),
        "not_compared": dict(addition.not_compared),
    }


def _described(addition: Addition, data: DataVersion, parts: Parts) -> Description:
    recipe = addition.plan.recipe
    changes = {
        "recipe": recipe.name,
        "method": recipe.method,
        "seed": recipe.seed,
        "stage": addition.stage,
        "order": addition.order,
        "data_md5": data.md5,
        "run_fingerprint": addition.plan.fingerprint,
        "encoders": describe_encoders(parts),
        "kinds": dict(parts.kinds),
        "attention": parts.attention,
        "max_new_tokens": parts.max_new_tokens,
        "tested": addition.tested(data.files),
        "grown_from": addition.digest,
    }
    return addition.origin.model_copy(update=changes)
