"""Tables over seeds: runs of the same recipe, method and order, with intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from graftline.evaluation import EvaluationError
from graftline.evaluation.bootstrap import Interval
from graftline.evaluation.cells import JOINT, csv_text
from graftline.evaluation.report import (
    RunScores,
    bootstrap_cells,
    check_same_settings,
    mean_of_all,
    read_report,
    run_intervals,
)

_HEADINGS = {"brg": "BRG", "brg_mean": "mean BRG", "frg_mean": "FRG", "retention": "retention"}
_NONE = "n/a"


@dataclass(frozen=True)
class SummaryRow:
    """One method in one order, over its seeds.

    Attributes:
        recipe: Name of the recipe.
        method: Name of the method.
        order: The modality of each stage.
        seeds: The runs' seeds, sorted.
        n_examples: Test examples, all modalities and tasks together.
        intervals: The headlines, and `scores.<modality>`; averaged over seeds.
        text_perplexity_before: Mean over seeds; `None` if a run lacks it.
        text_perplexity_after: The same for the last model.
        computing_seconds: What all steps took, mean over seeds.
        merging_seconds: What merging took of that.
        storage_bits: Bits a parameter that the last model's backbones take.
    """

    recipe: str
    method: str
    order: tuple[str, ...]
    seeds: tuple[int, ...]
    n_examples: int
    intervals: dict[str, Interval]
    text_perplexity_before: float | None
    text_perplexity_after: float | None
    computing_seconds: float
    merging_seconds: float
    storage_bits: float | None


def summarise_runs(folders: Iterable[Path | str], replicates: int = 2000) -> list[SummaryRow]:
    """Summarise finished runs: a row for each recipe, method and order, over its seeds.

    Args:
        folders: Report folders as `write_report` wrote them.
        replicates: Bootstrap replicates.

    Returns:
        The rows, in the order in which each group first appears.

    Raises:
        EvaluationError: A folder is not a report, a seed comes twice in a group, or runs of a
            group saw different data.
    """
    groups: dict[tuple[str, str, tuple[str, ...]], list[RunScores]] = {}
    for folder in folders:
        run = read_report(Path(folder))
        groups.setdefault((run.recipe, run.method, run.order), []).append(run)
    return [_summary(runs, replicates) for runs in groups.values()]


def markdown_table(rows: Sequence[SummaryRow]) -> str:
    """A Markdown table: gains in per cent, scores times 100, each with its 95 % interval.

    Args:
        rows: From `summarise_runs`.

    Returns:
        The table with a closing newline; a column a modality in the order of first appearance.
    """
    headings, lines = _fields(rows)
    escaped = [[field.replace("|", "\\|") for field in line] for line in lines]
    rule = "|" + " --- |" * len(headings)
    text = ["| " + " | ".join(line) + " |" for line in [headings, *escaped]]
    return "\n".join([text[0], rule, *text[1:]]) + "\n"


def csv_table(rows: Sequence[SummaryRow]) -> str:
    """The same table as CSV."""
    headings, lines = _fields(rows)
    return csv_text(headings, lines)


def _fields(rows: Sequence[SummaryRow]) -> tuple[list[str], list[list[str]]]:
    """Headings, and the fields of each row; gains that no row has are left out."""
    modalities = list(dict.fromkeys(m for row in rows for m in row.order))
    gains = {
        name: heading
        for name, heading in _HEADINGS.items()
        if any(name in row.intervals and row.intervals[name].estimate is not None for row in rows)
    }
    headings = ["method", *gains.values(), *(m.replace("_", " ") for m in modalities), "joint"]
    headings += ["text perplexity", "bits a parameter", "seconds to merge", "order", "seeds", "n"]
    lines = []
    for row in rows:
        fields = [label_of(row, rows[0].recipe)]
        fields += [_with_interval(row.intervals.get(name), 1.0) for name in gains]
        fields += [_with_interval(row.intervals.get(f"scores.{m}"), 100.0) for m in modalities]
        fields += [
            _with_interval(row.intervals.get(JOINT), 100.0),
            f"{_number(row.text_perplexity_before)} → {_number(row.text_perplexity_after)}",
            _NONE if row.storage_bits is None else f"{row.storage_bits:.1f}",
            f"{row.merging_seconds:.1f}",
            ", ".join(m.replace("_", " ") for m in row.order),
            ", ".join(str(seed) for seed in row.seeds),
            str(row.n_examples),
        ]
        lines.append(fields)
    return headings, lines


def label_of(row: SummaryRow, recipe: str) -> str:
    """The method, and the recipe's name where it is another one than `recipe`."""
    return row.method if row.recipe == recipe else f"{row.method} ({row.recipe})"


def _summary(runs: list[RunScores], replicates: int) -> SummaryRow:
    runs = sorted(runs, key=lambda run: run.seed)
    first = runs[0]
    name = f"{first.recipe}/{first.method}"
    seeds = tuple(run.seed for run in runs)
    if len(set(seeds)) != len(seeds):
        raise EvaluationError(f"{name}: a seed comes twice in {list(seeds)}; give each run once")
    versions = sorted({run.data_md5 for run in runs})
    if len(versions) > 1:
        raise EvaluationError(
            f"{name}: the runs saw different data ({', '.join(versions)}); run them on the same"
        )
    check_same_settings(name, runs)
    found = run_intervals([bootstrap_cells(run) for run in runs], first.order, replicates)
    return SummaryRow(
        recipe=first.recipe,
        method=first.method,
        order=first.order,
        seeds=seeds,
        n_examples=next(iter(found.values())).n_examples,
        intervals=found,
        text_perplexity_before=mean_of_all([run.text_perplexity_before for run in runs]),
        text_perplexity_after=mean_of_all([run.text_perplexity_after for run in runs]),
        computing_seconds=math.fsum(run.computing_seconds for run in runs) / len(runs),
        merging_seconds=math.fsum(run.merging_seconds for run in runs) / len(runs),
        storage_bits=mean_of_all([run.storage_bits for run in runs]),
    )


def _number(value: float | None) -> str:
    return _NONE if value is None else f"{value:.2f}"


def _with_interval(interval: Interval | None, factor: float) -> str:
    if interval is None or interval.estimate is None:
        return _NONE
    if interval.low is None or interval.high is None:
        return f"{factor * interval.estimate:.1f}"
    low, high = factor * interval.low, factor * interval.high
    return f"{factor * interval.estimate:.1f} [{low:.1f}, {high:.1f}]"
