"""Percentile bootstrap intervals over test examples and seeds (Efron & Tibshirani 1993, ch. 13).

A cell is one model's scores of one modality's test examples: `S[i][m]`, `V[m]` or `E[m]`. Its
score is the mean over tasks of the task means. One replicate draws, with replacement,

- the examples of each task of each modality, as many as there are. The same draw serves every
  cell of the modality and every seed, because they answered the same questions (paired); and
- the seeds, if there is more than one. Examples and seeds are crossed, so they are drawn apart
  (the "pigeonhole" bootstrap; Owen 2007), which errs on the wide side for the examples.

The statistic is computed for each seed and averaged over the seeds drawn. What the interval does
not know: scores stay as they were given (the idf of CIDEr-D is that of the whole test set), and
with fewer than about five seeds the spread between seeds is understated (the bootstrap's
variance is (k - 1) / k of the unbiased one: two thirds at three seeds).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from graftline.evaluation import EvaluationError

Key = TypeVar("Key", bound=Hashable)
Floats = NDArray[np.float64]

_LEVEL = 0.95  # coverage aimed at
_CHUNK = 200  # replicates drawn at once: bounds memory for large test sets


@dataclass(frozen=True)
class Cell:
    """One model's scores of one modality's test examples.

    Attributes:
        modality: Whose test set it is; cells of one modality are resampled alike.
        by_task: Task to scores, float array of shape (examples,), in the test set's order.
    """

    modality: str
    by_task: Mapping[str, ArrayLike]


@dataclass(frozen=True)
class Interval:
    """A percentile bootstrap interval.

    Attributes:
        estimate: The statistic of the data themselves, averaged over seeds; `None` if undefined.
        low: Lower end; `None` if the estimate is undefined, or too many replicates are.
        high: Upper end; likewise.
        n_examples: Test examples, of all modalities and tasks together, of one seed.
        n_seeds: Seeds.
        undefined: Share of replicates in which the statistic is undefined. They are left out;
            above 5 % there is no interval.
    """

    estimate: float | None
    low: float | None
    high: float | None
    n_examples: int
    n_seeds: int
    undefined: float = field(default=0.0)


@dataclass(frozen=True)
class Resampled:
    """Statistics of some runs and of their bootstrap replicates.

    Attributes:
        points: Name to the statistic of each seed (or other run), `None` where undefined.
        tables: Name to float64 of shape (seeds, replicates), NaN where undefined.
        weights: Float64 of shape (seeds, replicates): each seed's share in each replicate.
        sizes: Number of examples of each (modality, task) of one seed.
    """

    points: Mapping[str, tuple[float | None, ...]]
    tables: Mapping[str, Floats]
    weights: Floats
    sizes: Mapping[tuple[str, str], int]

    @property
    def n_examples(self) -> int:
        """Test examples, of all modalities and tasks together, of one seed."""
        return sum(self.sizes.values())

    def interval(self, name: str) -> Interval:
        """95 % interval of one statistic, averaged over seeds."""
        return _percentiles(self.points[name], self.tables[name], self.weights, self.n_examples)

    def among(self, seeds: Sequence[int]) -> Resampled:
        """Some of the seeds (by their places), weighted anew among themselves."""
        rows = list(seeds)
        replicates = self.weights.shape[1]
        return Resampled(
            {name: tuple(values[row] for row in rows) for name, values in self.points.items()},
            {name: table[rows] for name, table in self.tables.items()},
            _seed_weights(len(rows), replicates, np.random.default_rng(0)),
            self.sizes,
        )

    def with_numbers(self, name: str, numbers: Sequence[float | None]) -> Resampled:
        """A number of each seed more, which does not depend on the examples drawn."""
        column = np.array([math.nan if value is None else value for value in numbers])
        table = np.repeat(column[:, None], self.weights.shape[1], axis=1)
        return Resampled(
            {**self.points, name: tuple(numbers)},
            {**self.tables, name: table},
            self.weights,
            self.sizes,
        )

    def minus(self, other: Resampled) -> Resampled:
        """Paired differences of the statistics that both have, replicate by replicate.

        Raises:
            EvaluationError: The two were not resampled alike, so that nothing is paired.
        """
        if self.sizes != other.sizes or not np.array_equal(self.weights, other.weights):
            raise EvaluationError(
                "differences need the same test examples, the same number of runs and the same "
                f"draws: {dict(self.sizes)} and {dict(other.sizes)}, "
                f"{len(self.weights)} and {len(other.weights)} runs"
            )
        names = [name for name in self.points if name in other.points]
        return Resampled(
            {
                name: tuple(
                    None if mine is None or theirs is None else mine - theirs
                    for mine, theirs in zip(self.points[name], other.points[name], strict=True)
                )
                for name in names
            },
            {name: self.tables[name] - other.tables[name] for name in names},
            self.weights,
            self.sizes,
        )


def intervals(
    cells_per_seed: Sequence[Mapping[Key, Cell]],
    statistics: Callable[[Mapping[Key, float]], Mapping[str, float | None]],
    replicates: int = 2000,
    seed: int = 0,
) -> dict[str, Interval]:
    """95 % bootstrap intervals of several statistics over the same replicates.

    Args:
        cells_per_seed: For each seed, its cells by key; keys, tasks and numbers of examples are
            the same for every seed.
        statistics: From the cells' scores by key to named numbers, `None` where undefined; the
            names are always the same.
        replicates: Bootstrap replicates, at least 1.
        seed: Seed of the resampling.

    Returns:
        An interval for each name, in the statistic's unit.

    Raises:
        EvaluationError: There is no seed or no cell, seeds or cells do not match one another, a
            score is not finite, or there are no replicates.
    """
    found = resample(cells_per_seed, statistics, replicates, seed)
    return {name: found.interval(name) for name in found.points}


def resample(
    cells_per_seed: Sequence[Mapping[Key, Cell]],
    statistics: Callable[[Mapping[Key, float]], Mapping[str, float | None]],
    replicates: int = 2000,
    seed: int = 0,
) -> Resampled:
    """Statistics of every bootstrap replicate, from which intervals and differences are taken.

    What is drawn depends on the numbers of examples and of seeds alone: two methods that answered
    the same questions meet the same draws, so that their replicates are paired.

    Args:
        cells_per_seed: As for `intervals`.
        statistics: As for `intervals`.
        replicates: Bootstrap replicates, at least 1.
        seed: Seed of the resampling.

    Returns:
        The statistics of each seed, and of each seed in each replicate.

    Raises:
        EvaluationError: As for `intervals`.
    """
    if replicates < 1:
        raise EvaluationError(f"replicates {replicates} must be >= 1")
    seeds = [{key: _arrays(key, cell) for key, cell in cells.items()} for cells in cells_per_seed]
    sizes = _sizes(cells_per_seed, seeds)
    generator = np.random.default_rng(seed)
    observed, resampled = _cell_scores(cells_per_seed, seeds, sizes, replicates, generator)
    keys = list(cells_per_seed[0])
    points = [statistics(dict(zip(keys, row.tolist(), strict=True))) for row in observed]
    names = list(points[0])
    table = np.full((len(names), len(seeds), replicates), np.nan)
    for s, per_seed in enumerate(resampled):
        for r, row in enumerate(per_seed.tolist()):
            found = statistics(dict(zip(keys, row, strict=True)))
            table[:, s, r] = [math.nan if (v := found[name]) is None else v for name in names]
    return Resampled(
        points={name: tuple(point[name] for point in points) for name in names},
        tables=dict(zip(names, table, strict=True)),
        weights=_seed_weights(len(seeds), replicates, generator),
        sizes=sizes,
    )


def _arrays(key: object, cell: Cell) -> dict[str, Floats]:
    arrays = {t: np.asarray(v, dtype=np.float64) for t, v in sorted(cell.by_task.items())}
    if not arrays:
        raise EvaluationError(f"cell {key!r} has no task: evaluate {cell.modality} first")
    for task, values in arrays.items():
        if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
            raise EvaluationError(
                f"cell {key!r}, task {task!r}: needs finite scores of shape (examples,), at "
                f"least one; found shape {values.shape}"
            )
    return arrays


def _sizes(
    cells_per_seed: Sequence[Mapping[Key, Cell]], seeds: Sequence[Mapping[Key, dict[str, Floats]]]
) -> dict[tuple[str, str], int]:
    """Number of examples of each (modality, task), after checking that all cells agree."""
    if not cells_per_seed or not cells_per_seed[0]:
        raise EvaluationError("no scores to resample: give at least one seed with one cell")
    keys = set(cells_per_seed[0])
    sizes: dict[tuple[str, str], int] = {}
    tasks: dict[str, set[str]] = {}
    for cells, arrays in zip(cells_per_seed, seeds, strict=True):
        if set(cells) != keys:
            odd = sorted(repr(key) for key in set(cells) ^ keys)
            raise EvaluationError(
                f"the seeds have different cells: {', '.join(odd)}; complete the runs"
            )
        for key, cell in cells.items():
            if tasks.setdefault(cell.modality, set(arrays[key])) != set(arrays[key]):
                raise EvaluationError(
                    f"cell {key!r}: other tasks than another cell of {cell.modality}"
                )
            for task, values in arrays[key].items():
                expected = sizes.setdefault((cell.modality, task), len(values))
                if expected != len(values):
                    raise EvaluationError(
                        f"cell {key!r}, task {task!r}: {len(values)} examples, another cell of "
                        f"{cell.modality} has {expected}; score all on the same test set"
                    )
    return sizes


def _cell_scores(
    cells_per_seed: Sequence[Mapping[Key, Cell]],
    seeds: Sequence[Mapping[Key, dict[str, Floats]]],
    sizes: Mapping[tuple[str, str], int],
    replicates: int,
    generator: np.random.Generator,
) -> tuple[Floats, Floats]:
    """Scores of every cell: observed (seeds, cells), resampled (seeds, replicates, cells)."""
    keys = list(cells_per_seed[0])
    column = {key: index for index, key in enumerate(keys)}
    observed = np.zeros((len(seeds), len(keys)))
    resampled = np.zeros((len(seeds), replicates, len(keys)))
    for (modality, task), n in sorted(sizes.items()):
        places = [
            (s, key)
            for s, cells in enumerate(cells_per_seed)
            for key in keys
            if cells[key].modality == modality
        ]
        share = 1.0 / len(seeds[0][places[0][1]])
        values = np.stack([seeds[s][key][task] for s, key in places], axis=1)
        rows = [s for s, _ in places]
        columns = [column[key] for _, key in places]
        observed[rows, columns] += share * values.mean(axis=0)
        for start in range(0, replicates, _CHUNK):
            size = min(_CHUNK, replicates - start)
            means = _draw_counts(generator, size, n) @ values / n
            for place, (s, c) in enumerate(zip(rows, columns, strict=True)):
                resampled[s, start : start + size, c] += share * means[:, place]
    return observed, resampled


def _draw_counts(generator: np.random.Generator, replicates: int, n: int) -> Floats:
    """How often each of n items is drawn in n draws: float64 of shape (replicates, n)."""
    drawn = generator.integers(0, n, size=(replicates, n))
    drawn += np.arange(replicates)[:, None] * n
    counts = np.bincount(drawn.ravel(), minlength=replicates * n)
    return counts.reshape(replicates, n).astype(np.float64)


def _seed_weights(seeds: int, replicates: int, generator: np.random.Generator) -> Floats:
    """Weight of each seed in each replicate: (seeds, replicates), columns summing to one."""
    return _draw_counts(generator, replicates, seeds).T / seeds


def _percentiles(
    points: Sequence[float | None],
    table: Floats,
    weights: Floats,
    n_examples: int,
) -> Interval:
    """95 % interval of one statistic from its (seeds, replicates) table; NaN marks undefined."""
    needed = weights > 0.0
    undefined = (np.isnan(table) & needed).any(axis=0)
    share = float(undefined.mean())
    if any(point is None for point in points):
        return Interval(None, None, None, n_examples, len(points), share)
    estimate = math.fsum(point for point in points if point is not None) / len(points)
    if share > 0.05:
        return Interval(estimate, None, None, n_examples, len(points), share)
    values = np.where(needed, table * weights, 0.0).sum(axis=0)[~undefined]
    tail = 50.0 * (1.0 - _LEVEL)
    low, high = np.percentile(values, [tail, 100.0 - tail])
    return Interval(estimate, float(low), float(high), n_examples, len(points), share)
