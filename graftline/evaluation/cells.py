"""Scores of one task of one modality with one model, example by example, and as CSV.

`examples.csv` keeps every score, a row a cell, so that intervals over several seeds can be computed
later from the folders alone.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from graftline.evaluation import EvaluationError

Point = Literal["vanilla", "merged", "final", "expert"]
JOINT = "joint"
"""Stands for a modality where questions over several modalities were scored."""
Place = tuple[str, int, str]
"""A model's place: (point, stage, modality scored); the stage of an expert is 0."""

_EXAMPLE_COLUMNS = ("stage", "stage_modality", "modality", "task", "point", "metric", "scores")


@dataclass(frozen=True)
class ScoreCell:
    """The examples of one task of one modality, scored with one model.

    Attributes:
        stage: The stage that the model ends, from 1; 0 for an expert, which is outside the chain.
        stage_modality: The modality that the stage adds; for an expert its own modality.
        modality: The modality of the examples.
        task: `question` or `caption`.
        point: `vanilla` after naive fine-tuning, `merged` after merging, `final` at the stage's
            end, `expert` for a model trained on this modality alone.
        metric: The metric's name.
        examples: Score of each example from 0 to 1, in the test set's order, at least one.
    """

    stage: int
    stage_modality: str
    modality: str
    task: str
    point: Point
    metric: str
    examples: tuple[float, ...]

    def __post_init__(self) -> None:
        name = f"scores of {self.modality} {self.task} ({self.point}, stage {self.stage})"
        if self.point not in get_args(Point):
            raise EvaluationError(f"{name}: the point is one of {list(get_args(Point))}")
        if not self.examples:
            raise EvaluationError(f"{name}: no example was scored")
        if not all(math.isfinite(score) and score >= 0.0 for score in self.examples):
            raise EvaluationError(f"{name}: every score must be finite and not negative")

    @property
    def n(self) -> int:
        """Number of examples."""
        return len(self.examples)

    @property
    def score(self) -> float:
        """Mean score of the examples."""
        return math.fsum(self.examples) / len(self.examples)

    @property
    def place(self) -> Place:
        """Which model scored which modality."""
        return (self.point, 0 if self.point == "expert" else self.stage, self.modality)


def examples_csv(cells: Iterable[ScoreCell]) -> str:
    """The content of `examples.csv`: a row a cell, with every example's score."""
    columns = _EXAMPLE_COLUMNS[:-1]
    rows = [[*(getattr(cell, name) for name in columns), _joined(cell.examples)] for cell in cells]
    return csv_text(_EXAMPLE_COLUMNS, rows)


def cells_in(text: str) -> tuple[ScoreCell, ...]:
    """The cells of an `examples.csv`, exactly as `examples_csv` wrote them."""
    csv.field_size_limit(1 << 30)  # a field holds as many scores as the test set has rows
    return tuple(_cell(row) for row in csv.DictReader(io.StringIO(text, newline="")))


def _joined(scores: Iterable[float]) -> str:
    """Every score, exactly, in the order of the rows."""
    return " ".join(repr(float(score)).removesuffix(".0") for score in scores)


def _cell(row: Mapping[str, str]) -> ScoreCell:
    stage, stage_modality, modality, task, point, metric, scores = (
        row[column] for column in _EXAMPLE_COLUMNS
    )
    checked: Any = point
    examples = tuple(float(score) for score in scores.split())
    return ScoreCell(int(stage), stage_modality, modality, task, checked, metric, examples)


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Headings and rows as CSV."""
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return stream.getvalue()
