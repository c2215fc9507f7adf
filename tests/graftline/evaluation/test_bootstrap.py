"""Bootstrap intervals: coverage, pairing, seeds, speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest

from graftline.evaluation import EvaluationError
from graftline.evaluation.bootstrap import Cell, Interval, intervals


def mean_of(scores: Mapping[str, float]) -> float | None:
    return scores["a"]


def interval(
    cells: Sequence[Mapping[str, Cell]],
    statistic: Callable[[Mapping[str, float]], float | None],
    replicates: int = 2000,
    seed: int = 0,
) -> Interval:
    return intervals(cells, lambda scores: {"": statistic(scores)}, replicates, seed)[""]


def test_coverage_of_a_mean() -> None:
    generator = np.random.default_rng(1)
    hits = 0
    trials = 300
    for trial in range(trials):
        cells = {"a": Cell("image", {"question": (generator.random(120) < 0.7).astype(float)})}
        found = interval([cells], mean_of, replicates=400, seed=trial)
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= 0.7 <= found.high
    assert 0.91 <= hits / trials <= 0.985


def test_width_matches_theory_and_is_reproducible() -> None:
    values = np.random.default_rng(2).normal(5.0, 1.0, size=400)
    cells = [{"a": Cell("image", {"question": values})}]
    found = interval(cells, mean_of, replicates=4000)
    assert found == interval(cells, mean_of, replicates=4000)
    assert found != interval(cells, mean_of, replicates=4000, seed=1)
    assert found.estimate == pytest.approx(values.mean())
    assert (found.n_examples, found.n_seeds, found.undefined) == (400, 1, 0.0)
    standard_error = values.std() / 20.0
    assert (found.high or 0) - (found.low or 0) == pytest.approx(2 * 1.96 * standard_error, rel=0.1)


def test_cells_of_a_modality_are_paired() -> None:
    """A model that scores exactly half of another on each example has a ratio without spread."""
    values = np.random.default_rng(3).random(50) + 0.1
    cells = {
        "a": Cell("image", {"question": values, "caption": values[:20]}),
        "b": Cell("image", {"question": values / 2, "caption": values[:20] / 2}),
        "c": Cell("audio", {"question": values / 2, "caption": values[:20] / 2}),
    }
    paired = interval([cells] * 2, lambda s: s["b"] / s["a"], 300)
    assert (paired.low, paired.high) == pytest.approx((0.5, 0.5))
    apart = interval([cells], lambda s: s["c"] / s["a"], 300)
    assert (apart.high or 0) - (apart.low or 0) > 0.02


def test_score_is_the_mean_over_tasks() -> None:
    cells = {"a": Cell("image", {"question": [1.0] * 90, "caption": [0.0] * 10})}
    found = interval([cells], mean_of, 50)
    assert (found.estimate, found.low, found.high) == (0.5, 0.5, 0.5)
    assert found.n_examples == 100


def test_seeds_are_resampled() -> None:
    """With constant examples all spread comes from the seeds: the mean of 3 draws of {0, 1, 2}."""
    seeds = [{"a": Cell("image", {"question": [float(s)] * 5})} for s in range(3)]
    found = interval(seeds, mean_of, 4000)
    assert found.estimate == 1.0
    assert (found.low, found.high) == (0.0, 2.0)
    assert found.n_seeds == 3


def test_undefined_statistics() -> None:
    def inverse(scores: Mapping[str, float]) -> float | None:
        return 1 / scores["a"] if scores["a"] else None

    never = interval([{"a": Cell("image", {"question": [0.0] * 4})}], inverse, 50)
    assert (never.estimate, never.low, never.undefined) == (None, None, 1.0)
    often = interval([{"a": Cell("image", {"question": [0.0, 0.0, 1.0]})}], inverse, 500)
    assert often.estimate == pytest.approx(3.0)
    assert often.low is None
    assert often.undefined > 0.05
    rare = interval([{"a": Cell("image", {"question": [0.0, 1.0, 1.0, 1.0]})}], inverse, 4000)
    assert 0.0 < rare.undefined < 0.05
    assert rare.high == pytest.approx(4.0)


def test_speed_of_the_starter() -> None:
    generator = np.random.default_rng(4)
    modalities = ["image", "audio", "video", "point_cloud"]
    seeds = [
        {
            (m, c): Cell(m, {t: generator.random(200) for t in ("question", "caption")})
            for m in modalities
            for c in range(10)
        }
        for _ in range(3)
    ]

    def statistic(scores: Mapping[tuple[str, int], float]) -> float:
        return sum(scores[m, 0] / scores[m, 1] for m in modalities)

    start = time.process_time()
    found = interval(seeds, statistic)
    assert isinstance(found, Interval)
    assert time.process_time() - start < 2.0


@pytest.mark.parametrize(
    ("seeds", "words"),
    [
        ([], "no scores"),
        ([{}], "no scores"),
        ([{"a": Cell("image", {})}], "no task"),
        ([{"a": Cell("image", {"question": []})}], "at least one"),
        ([{"a": Cell("image", {"question": [np.nan]})}], "finite"),
        ([{"a": Cell("image", {"question": [1.0]})}, {}], "different cells: 'a'"),
        (
            [
                {"a": Cell("image", {"question": [1.0]})},
                {"a": Cell("image", {"question": [1.0, 2.0]})},
            ],
            "same test set",
        ),
        (
            [
                {
                    "a": Cell("image", {"question": [1.0]}),
                    "b": Cell("image", {"caption": [1.0]}),
                }
            ],
            "other tasks",
        ),
    ],
)
def test_bad_input_is_named(seeds: list[dict[str, Cell]], words: str) -> None:
    with pytest.raises(EvaluationError, match=words):
        interval(seeds, mean_of, 10)


def test_there_must_be_replicates() -> None:
    cells = [{"a": Cell("image", {"question": [1.0]})}]
    with pytest.raises(EvaluationError, match="replicates 0"):
        intervals(cells, lambda s: {"x": s["a"]}, replicates=0)
