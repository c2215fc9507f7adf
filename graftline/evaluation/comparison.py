"""Methods side by side: means over their runs with intervals, and paired differences.

A run is a seed in an order of modalities. Every method has the same runs, scored on the same test
rows, so the difference of two methods is taken within each bootstrap replicate: both meet the same
rows and the same runs. Intervals are over test rows and runs (see
`graftline.evaluation.bootstrap`); orders and seeds are resampled together, as runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from graftline.evaluation import EvaluationError
from graftline.evaluation.bootstrap import Cell, Interval, Resampled, resample
from graftline.evaluation.cells import JOINT, Place
from graftline.evaluation.gains import Gains
from graftline.evaluation.report import (
    COSTS,
    HEADLINES,
    RunScores,
    bootstrap_cells,
    check_same_settings,
    gains_of,
    mean_of_all,
    place_scores,
    split_scores,
)

PERPLEXITY = "text_perplexity"
LEARNED = 20.0
"""Retention in per cent below which a method has no rank: who learns nothing forgets nothing."""
Order = tuple[str, ...]
StageSpread = Mapping[int, Mapping[str, tuple[float, float, float]]]
"""Stage -> modality -> (mean, lowest, highest score) over seeds."""


@dataclass(frozen=True)
class ComparedMethod:
    """One method of a comparison, over its runs.

    Attributes:
        label: what people read.
        method: the method's name.
        rank: by BRG, 1 the highest; `None` where BRG is undefined, or retention below `LEARNED`.
        intervals: gains in per cent, `scores.<modality>` and `joint` from 0 to 1, and
            `text_perplexity`; means over runs. An end is `None` where nothing was resampled.
        differences: this method less the baseline, paired; empty for the baseline itself.
        undefined: gain -> why it has no value.
        by_order: order -> BRG over its seeds, in the order of the comparison.
        stages: scores over stages in the first order.
        brg_per_stage: stage -> BRG in the first order, mean over seeds; where it is defined.
        costs: name of `COSTS` -> mean over runs; `None` where a run's report lacks it.
        n: test rows of a run, all modalities and tasks together.
        n_joint: joint questions of a run; 0 where none were asked.
        orders: the orders, each once.
        seeds: the seeds, each once, sorted.
        runs: how many runs.
        text_perplexity_before: of the untouched base.
    """

    label: str
    method: str
    rank: int | None
    intervals: Mapping[str, Interval]
    differences: Mapping[str, Interval]
    undefined: Mapping[str, str]
    by_order: Mapping[Order, Interval]
    stages: StageSpread
    brg_per_stage: Mapping[int, float]
    costs: Mapping[str, float | None]
    n: int
    n_joint: int
    orders: tuple[Order, ...]
    seeds: tuple[int, ...]
    runs: int
    text_perplexity_before: float | None


def compare_runs(
    groups: Mapping[str, Sequence[RunScores]], baseline: str | None, replicates: int = 2000
) -> list[ComparedMethod]:
    """Compares methods that have the same runs.

    Args:
        groups: label -> the method's runs.
        baseline: label of the method that differences are taken from; `None` takes none.
        replicates: bootstrap replicates.

    Returns:
        The methods by BRG, the highest first; those without BRG behind them, by retention.

    Raises:
        EvaluationError: methods lack runs that others have, or saw other data or test rows.
    """
    _check(groups)
    orders = list(dict.fromkeys(run.order for run in next(iter(groups.values()))))
    sorted_runs = {
        label: sorted(runs, key=lambda run: (orders.index(run.order), run.seed))
        for label, runs in groups.items()
    }
    resampled = {label: _resampled(runs, replicates) for label, runs in sorted_runs.items()}
    origin = resampled.get(baseline) if baseline is not None else None
    found = [
        _method(label, sorted_runs[label], own, None if label == baseline else origin)
        for label, own in resampled.items()
    ]
    found.sort(key=_place)
    return [
        replace(method, rank=number if _is_ranked(method) else None)
        for number, method in enumerate(found, start=1)
    ]


def _check(groups: Mapping[str, Sequence[RunScores]]) -> None:
    if not groups or not all(groups.values()):
        raise EvaluationError("there is nothing to compare: give every method at least one run")
    expected: set[tuple[Order, int]] = set()
    rows: dict[tuple[str, str], int] = {}
    data = next(iter(groups.values()))[0].data_md5
    for label, runs in groups.items():
        places = [(run.order, run.seed) for run in runs]
        expected = expected or set(places)
        if len(set(places)) != len(places) or set(places) != expected:
            raise EvaluationError(
                f"{label}: its runs are {_words(places)}, those of the first method "
                f"{_words(expected)}; methods are compared over the same orders and seeds"
            )
        check_same_settings(label, runs)
        for run in runs:
            if run.data_md5 != data:
                raise EvaluationError(
                    f"{label}: the runs saw different data ({data}, {run.data_md5}); run them on "
                    "the same"
                )
            for cell in run.cells:
                if rows.setdefault((cell.modality, cell.task), cell.n) != cell.n:
                    raise EvaluationError(
                        f"{label}: {cell.n} rows of {cell.modality} {cell.task} beside "
                        f"{rows[cell.modality, cell.task]}; score all on the same test rows"
                    )


def _words(places: Any) -> str:
    return "; ".join(f"{' '.join(order)} seed {seed}" for order, seed in sorted(places))


def _resampled(runs: Sequence[RunScores], replicates: int) -> tuple[Resampled, Resampled | None]:
    """The runs' statistics, and those of their joint questions where all were asked."""
    numbers = tuple(str(number) for number in range(1, len(runs[0].order) + 1))
    modalities = sorted(runs[0].order)

    def statistics(scores: Mapping[Place, float]) -> dict[str, float | None]:
        gains = gains_of(scores, numbers)
        named: dict[str, float | None] = {k: getattr(gains, k).value for k in HEADLINES}
        named |= {f"scores.{name}": scores["own", 0, name] for name in modalities}
        return named

    own = resample([_cells(run) for run in runs], statistics, replicates)
    own = own.with_numbers(PERPLEXITY, [run.text_perplexity_after for run in runs])
    asked: Place = ("final", len(numbers), JOINT)
    joint = [{asked: cells[asked]} for run in runs if asked in (cells := bootstrap_cells(run))]
    if len(joint) < len(runs):
        return own, None
    return own, resample(joint, lambda scores: {JOINT: scores[asked]}, replicates)


def _cells(run: RunScores) -> dict[Place, Cell]:
    """Cells that runs in different orders have in common.

    Instead of its name a modality has its number in the run's order, as gains need it; the last
    model's scores are there once more by name, point `own`. Rows stay tied to their modality.
    """
    number = {name: str(place) for place, name in enumerate(run.order, start=1)}
    last, cells = len(run.order), dict[Place, Cell]()
    for (point, stage, modality), cell in bootstrap_cells(run).items():
        if point in ("final", "vanilla", "expert") and modality != JOINT:
            cells[point, stage, number[modality]] = cell
            if (point, stage) == ("final", last):
                cells["own", 0, modality] = cell
    missing = [name for name in run.order if ("own", 0, name) not in cells]
    if missing:
        raise EvaluationError(f"{run.method}: no final score of {', '.join(missing)}")
    return cells


def _method(
    label: str,
    runs: list[RunScores],
    own: tuple[Resampled, Resampled | None],
    baseline: tuple[Resampled, Resampled | None] | None,
) -> ComparedMethod:
    first = runs[0]
    orders = tuple(dict.fromkeys(run.order for run in runs))
    differences: dict[str, Interval] = {}
    if baseline is not None:
        for mine, theirs in zip(own, baseline, strict=True):
            if mine is not None and theirs is not None:
                differences |= _intervals(mine.minus(theirs))
    intervals = {name: each for part in own if part is not None for name, each in
                 _intervals(part).items()}  # fmt: skip
    gains = [gains_of(place_scores(run), run.order) for run in runs]
    reasons = {k: getattr(each, k).reason for each in reversed(gains) for k in HEADLINES
               if getattr(each, k).value is None}  # fmt: skip
    main, joint = own
    places = {order: [i for i, run in enumerate(runs) if run.order == order] for order in orders}
    return ComparedMethod(
        label=label,
        method=first.method,
        rank=None,
        intervals=intervals,
        differences=differences,
        undefined=reasons,
        by_order={order: main.among(rows).interval("brg") for order, rows in places.items()},
        stages=_stages([run for run in runs if run.order == orders[0]]),
        brg_per_stage=_brg_per_stage([gains[row] for row in places[orders[0]]]),
        costs={name: mean_of_all([getattr(run, name) for run in runs]) for name in COSTS},
        n=main.n_examples,
        n_joint=joint.n_examples if joint is not None else 0,
        orders=orders,
        seeds=tuple(sorted({run.seed for run in runs})),
        runs=len(runs),
        text_perplexity_before=mean_of_all([run.text_perplexity_before for run in runs]),
    )


def _intervals(found: Resampled) -> dict[str, Interval]:
    """Every statistic's interval; the text is one, so a single run's perplexity has none."""
    intervals = {name: found.interval(name) for name in found.points}
    if PERPLEXITY in intervals and len(found.weights) == 1:
        only = intervals[PERPLEXITY]
        intervals[PERPLEXITY] = Interval(only.estimate, None, None, only.n_examples, 1)
    return intervals


def _stages(runs: Sequence[RunScores]) -> StageSpread:
    found: dict[int, dict[str, list[float]]] = {}
    for run in runs:
        for stage, scores in split_scores(place_scores(run), run.order)[0].items():
            for modality, score in scores.items():
                if modality != JOINT:
                    found.setdefault(stage, {}).setdefault(modality, []).append(score)
    return {
        stage: {
            name: (math.fsum(values) / len(values), min(values), max(values))
            for name, values in scores.items()
        }
        for stage, scores in found.items()
    }


def _brg_per_stage(gains: Sequence[Gains]) -> dict[int, float]:
    means = {
        stage: mean_of_all([each.brg_per_stage[stage].value for each in gains])
        for stage in gains[0].brg_per_stage
    }
    return {stage: mean for stage, mean in means.items() if mean is not None}


def _place(method: ComparedMethod) -> tuple[bool, float, str]:
    brg = method.intervals["brg"].estimate
    value = method.intervals["retention"].estimate if brg is None else brg
    return not _is_ranked(method), -math.inf if value is None else -value, method.label


def _is_ranked(method: ComparedMethod) -> bool:
    retention = method.intervals["retention"].estimate
    learned = retention is None or retention >= LEARNED
    return learned and method.intervals["brg"].estimate is not None
