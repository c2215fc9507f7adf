"""`graftline drift`: which connectors need realigning, predicted and, where it can be, measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from flows.options import (
    Method,
    RecipePath,
    Seed,
    Settings,
    checked,
    console,
    no_data,
    out,
    overrides_of,
)
from tasks.environment import prepare

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from graftline.recipe import Recipe
    from graftline.steps.drifting import ConnectorDrift


def drift(
    recipe: RecipePath,
    method: Method = None,
    seed: Seed = None,
    settings: Settings = None,
    samples: Annotated[
        int, typer.Option(min=1, help="Media that are drawn a modality from what was recorded.")
    ] = 64,
) -> None:
    """Predict which connectors the last merge left out of step; compare with realign's gain."""
    prepare()
    chosen = checked(recipe, overrides_of(method, seed, settings))
    from pathlib import Path

    from graftline.planning.problems import require_device
    from graftline.progress import shown
    from graftline.steps.drifting import connector_drifts
    from graftline.steps.work import Machine
    from graftline.stores import open_store
    from tasks.outputs import usual_order
    from tasks.own_data import whole_data

    require_device(chosen.execution.device)
    version = whole_data(chosen)
    if version is None:
        raise no_data(chosen, recipe)
    machine = Machine(Path(chosen.data.folder), chosen.execution.device)
    with shown(console):
        found = connector_drifts(chosen, version.files, open_store(chosen.store), machine, samples)
    gains = _gains(chosen, usual_order(recipe))
    file = Path("reports") / chosen.name / "drift" / f"{chosen.method}-seed-{chosen.seed}.csv"
    _write(file, found, gains)
    for line in _lines(found, gains):
        out.print(line, markup=False, highlight=False, soft_wrap=True)
    out.print(str(file), soft_wrap=True)


def _gains(recipe: Recipe, usual: Sequence[str]) -> dict[str, float]:
    """Modality -> what realigning brought at the last stage, where a finished run measured it."""
    from graftline.evaluation.report import place_scores, read_report
    from tasks.outputs import report_folder

    folder = report_folder(recipe, usual)
    if not (folder / "metrics.json").exists():
        return {}
    scores, last = place_scores(read_report(folder)), len(recipe.order)
    return {
        name: scores["final", last, name] - scores["merged", last, name]
        for name in recipe.order
        if ("merged", last, name) in scores
    }


def _write(file: Path, found: Sequence[ConnectorDrift], gains: dict[str, float]) -> None:
    from graftline.durable import atomic_write_text

    rows = ["modality,readings,answers,gain"]
    rows += [f"{d.modality},{d.readings:.6g},{d.answers:.6g},{_gain(d, gains)}" for d in found]
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(file, "\n".join(rows) + "\n")


def _gain(drift: ConnectorDrift, gains: dict[str, float]) -> str:
    return f"{gains[drift.modality]:.6g}" if drift.modality in gains else ""


def _lines(found: Sequence[ConnectorDrift], gains: dict[str, float]) -> list[str]:
    from graftline.realignment.drift import rank_correlation

    lines = [f"{'':<14}{'readings':>10}{'answers':>10}{'gain x 100':>12}"]
    for each in sorted(found, key=lambda drift: -drift.answers):
        gain = f"{100 * gains[each.modality]:.1f}" if each.modality in gains else ""
        lines.append(f"{each.modality:<14}{each.readings:>10.4f}{each.answers:>10.3f}{gain:>12}")
    both = [each for each in found if each.modality in gains]
    measured = [gains[each.modality] for each in both]
    for what in ("readings", "answers"):
        rank = rank_correlation([getattr(each, what) for each in both], measured)
        if rank is not None:
            lines.append(f"rank correlation of {what} with the measured gain: {rank:.2f}")
    return lines
