"""Worked examples and properties of the gains."""

from __future__ import annotations

import doctest
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graftline.evaluation import EvaluationError, gains
from graftline.evaluation.gains import Gain, all_gains, brg, frg, mean_gain, retention

ORDER = ["image", "audio", "point_cloud"]
SCORES = {
    1: {"image": 0.80},
    2: {"image": 0.76, "audio": 0.90},
    3: {"image": 0.72, "audio": 0.81, "point_cloud": 0.95},
}
VANILLA = {"image": 0.80, "audio": 0.90, "point_cloud": 1.00}
EXPERTS = {"image": 0.90, "audio": 0.90, "point_cloud": 1.00}


def test_docstring_numbers() -> None:
    result = doctest.testmod(gains)
    assert result.attempted >= 9
    assert result.failed == 0


def test_worked_example() -> None:
    assert brg(2, SCORES, ORDER).value == pytest.approx(95.0)
    assert brg(3, SCORES, ORDER).value == pytest.approx(90.0)
    assert frg(3, SCORES, VANILLA, ORDER).value == pytest.approx(95.0)
    assert retention(SCORES, EXPERTS, ORDER).value == pytest.approx(100 / 3 * (0.8 + 0.9 + 0.95))
    found = all_gains(SCORES, ORDER, vanilla=VANILLA, experts=EXPERTS)
    assert found.brg == brg(3, SCORES, ORDER)
    assert found.brg_mean.value == pytest.approx(92.5)
    assert found.frg_mean.value == pytest.approx((100.0 + 95.0) / 2)
    assert sorted(found.brg_per_stage) == [2, 3]
    assert sorted(found.frg_per_stage) == [1, 2, 3]


def test_signs() -> None:
    """Losing an old modality lowers BRG alone; learning a new one badly lowers FRG alone."""
    forgets = {**SCORES, 3: {**SCORES[3], "image": 0.10}}
    assert (brg(3, forgets, ORDER).value or 0) < (brg(3, SCORES, ORDER).value or 0)
    assert frg(3, forgets, VANILLA, ORDER) == frg(3, SCORES, VANILLA, ORDER)
    rigid = {**SCORES, 3: {**SCORES[3], "point_cloud": 0.10}}
    assert brg(3, rigid, ORDER) == brg(3, SCORES, ORDER)
    assert (frg(3, rigid, VANILLA, ORDER).value or 0) < 95.0
    better = {1: {"image": 0.5}, 2: {"image": 0.6, "audio": 0.9}}
    assert brg(2, better, ORDER[:2]).value == pytest.approx(120.0)


def test_first_stage_forward_gain() -> None:
    assert frg(1, SCORES, {}, ORDER) == Gain(100.0)
    assert frg(1, SCORES, {"image": 1.0}, ORDER).value == pytest.approx(80.0)
    first_differs = all_gains(SCORES, ORDER, vanilla={**VANILLA, "image": 0.01})
    assert first_differs.frg_mean.value == pytest.approx(97.5)


def test_zero_reference_is_undefined_with_reason() -> None:
    zero = {1: {"image": 0.0}, 2: {"image": 0.5, "audio": 0.9}}
    found = all_gains(zero, ORDER[:2], vanilla={"audio": 0.0}, experts={"image": 1, "audio": 0})
    for gain in (found.brg, found.brg_mean, found.frg_mean, found.retention):
        assert gain.value is None
        assert "zero" in str(gain.reason)
    assert "image after stage 1" in str(found.brg.reason)
    assert frg(1, {1: {"image": 0.5}}, {"image": 5e-324}, ["image"]).value is None


def test_methods_without_stages_vanilla_or_experts() -> None:
    joint = all_gains({3: SCORES[3]}, ORDER, experts=EXPERTS)
    assert joint.brg.value is None
    assert joint.frg_mean.value is None
    assert "no stages" in str(joint.brg.reason)
    assert joint.retention.value is not None
    alone = all_gains({1: {"image": 0.8}}, ["image"])
    assert alone.brg.value is None
    assert alone.frg_per_stage[1] == Gain(100.0)
    assert alone.frg_mean.value is None
    assert "no expert" in str(alone.retention.reason)
    assert mean_gain({}).value is None


@pytest.mark.parametrize(
    ("scores", "order", "words"),
    [
        ({1: {"image": 0.8}, 3: SCORES[3]}, ORDER, "no score of image after stage 2"),
        ({**SCORES, 2: {"image": math.nan, "audio": 1}}, ORDER, "image after stage 2 is nan"),
        ({**SCORES, 1: {"image": -0.1}}, ORDER, "finite and not negative"),
        (SCORES, [], "empty"),
        (SCORES, ["image", "image"], "twice"),
    ],
)
def test_bad_input_is_named(
    scores: dict[int, dict[str, float]], order: list[str], words: str
) -> None:
    with pytest.raises(EvaluationError, match=words):
        all_gains(scores, order)


def test_stage_outside_order() -> None:
    with pytest.raises(EvaluationError, match="stage 4 is outside"):
        brg(4, SCORES, ORDER)


positive = st.floats(0.01, 1.0)


@st.composite
def matrices(draw: st.DrawFn) -> tuple[list[str], dict[int, dict[str, float]]]:
    count = draw(st.integers(2, 6))
    order = draw(st.permutations([f"m{i}" for i in range(count)]))
    scores = {i: {m: draw(positive) for m in order[:i]} for i in range(1, count + 1)}
    return order, scores


@settings(max_examples=60, deadline=None)
@given(matrices(), st.floats(0.1, 10.0))
def test_scaling_all_scores_changes_nothing(
    matrix: tuple[list[str], dict[int, dict[str, float]]], factor: float
) -> None:
    order, scores = matrix
    scaled = {i: {m: factor * v for m, v in row.items()} for i, row in scores.items()}
    last = len(order)
    experts = dict.fromkeys(order, 0.5)
    larger = dict.fromkeys(order, factor * 0.5)
    assert brg(last, scaled, order).value == pytest.approx(brg(last, scores, order).value)
    assert frg(last, scaled, larger, order).value == pytest.approx(
        frg(last, scores, experts, order).value
    )
    assert retention(scaled, larger, order).value == pytest.approx(
        retention(scores, experts, order).value
    )


@settings(max_examples=60, deadline=None)
@given(matrices(), st.randoms(use_true_random=False))
def test_relabelling_and_reordering(
    matrix: tuple[list[str], dict[int, dict[str, float]]], random: object
) -> None:
    """Older stages in another order, with their scores, give the same BRG_N and retention."""
    order, scores = matrix
    last = len(order)
    older = list(range(1, last))
    random.shuffle(older)  # type: ignore[attr-defined]
    permuted = [order[j - 1] for j in older] + [order[-1]]
    moved: dict[int, dict[str, float]] = {last: dict(reversed(scores[last].items()))}
    for place, j in enumerate(older, start=1):
        moved[place] = {order[j - 1]: scores[j][order[j - 1]]}
    assert brg(last, moved, permuted).value == pytest.approx(brg(last, scores, order).value)
    experts = dict.fromkeys(order, 0.7)
    assert retention(moved, experts, permuted) == retention(scores, experts, order)


@settings(max_examples=60, deadline=None)
@given(st.lists(positive, min_size=2, max_size=7))
def test_no_change_is_exactly_one_hundred(values: list[float]) -> None:
    order = [f"m{i}" for i in range(len(values))]
    held = dict(zip(order, values, strict=True))
    scores = {i: {m: held[m] for m in order[:i]} for i in range(1, len(order) + 1)}
    found = all_gains(scores, order, vanilla=held, experts=held)
    for gain in (found.brg, found.brg_mean, found.frg_mean, found.retention):
        assert gain.value == pytest.approx(100.0, abs=1e-12)
