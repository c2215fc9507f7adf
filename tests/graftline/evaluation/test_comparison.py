"""Methods side by side: worked examples of means, intervals, paired differences, and the page."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from dataclasses import replace

import pytest

from graftline.evaluation import EvaluationError
from graftline.evaluation.cells import JOINT, ScoreCell
from graftline.evaluation.comparison import ComparedMethod, compare_runs
from graftline.evaluation.comparison_page import page
from graftline.evaluation.comparison_pictures import initials
from graftline.evaluation.comparison_table import TimeSpent, comparison_csv, markdown
from graftline.evaluation.report import RunScores

AB, BA = ("image", "audio"), ("audio", "image")
COSTS = {
    "trained_parameters": 134_515_008, "stored_bytes_per_modality": 512_000.0,
    "carried_bytes": 4_100_000.0,
    "replay_rows": 640, "training_seconds": 1234.0, "evaluating_seconds": 300.0,
}  # fmt: skip


def make(
    method: str,
    kept: float,
    order: tuple[str, ...] = AB,
    seed: int = 0,
    learned: float = 0.8,
    rows: tuple[float, ...] = (1.0,) * 8,
    costs: Mapping[str, float] = COSTS,
) -> RunScores:
    """A run of two stages whose first modality keeps a share of what it scored: BRG = 100 kept."""
    first, second = order

    def cell(stage: int, modality: str, point: str, score: float) -> ScoreCell:
        examples = tuple(score * row for row in rows)
        added = order[stage - 1] if stage else modality
        return ScoreCell(stage, added, modality, "question", point, "exact_match", examples)  # type: ignore[arg-type]

    cells = [
        cell(1, first, "vanilla", learned),
        cell(1, first, "final", learned),
        cell(2, second, "vanilla", 0.5),
        cell(2, first, "final", learned * kept),
        cell(2, second, "final", 0.4),
        ScoreCell(2, second, JOINT, "two media", "final", "exact_match", (0.5,) * 6),
        cell(0, first, "expert", 1.0),
        cell(0, second, "expert", 1.0),
    ]
    return RunScores(
        "demo", method, seed, order, tuple(cells), 100.0, 90.0, 1.0, 10**9, "abc",
        f"{method}{seed}", 50.0, 60.0 + seed, 16.0, **costs, idle_seconds=5.0,  # type: ignore[arg-type]
    )  # fmt: skip


def by_label(methods: list[ComparedMethod]) -> dict[str, ComparedMethod]:
    return {method.label: method for method in methods}


def ends(interval: object) -> tuple[float | None, ...]:
    return tuple(getattr(interval, name) for name in ("estimate", "low", "high"))


def test_means_and_intervals_over_orders_and_seeds() -> None:
    groups = {
        "mera": [make("mera", 1.0), make("mera", 0.9, BA)],
        "finetune": [make("finetune", 0.5), make("finetune", 0.4, BA)],
    }
    first, second = compare_runs(groups, "mera", 500)
    assert [(m.label, m.rank) for m in (first, second)] == [("mera", 1), ("finetune", 2)]
    # all rows are alike, so runs alone vary: a drawn mean of two is 90, 95 or 100
    assert ends(first.intervals["brg"]) == pytest.approx((95.0, 90.0, 100.0))
    assert ends(second.intervals["brg"]) == pytest.approx((45.0, 40.0, 50.0))
    assert ends(first.intervals["frg_mean"]) == pytest.approx((80.0, 80.0, 80.0))
    # by name, whatever its place: image .8 when first, .4 when last
    assert ends(first.intervals["scores.image"]) == pytest.approx((0.6, 0.4, 0.8))
    assert ends(first.intervals["retention"]) == pytest.approx((58.0, 56.0, 60.0))
    # paired: the runs differ by 50 each, so no draw of runs changes the difference
    assert ends(second.differences["brg"]) == pytest.approx((-50.0, -50.0, -50.0))
    assert first.differences == {}
    assert ends(first.by_order[AB]) == pytest.approx((100.0, 100.0, 100.0))
    assert ends(first.by_order[BA]) == pytest.approx((90.0, 90.0, 90.0))
    assert (first.n, first.n_joint, first.runs, first.orders) == (16, 6, 2, (AB, BA))
    assert first.brg_per_stage == pytest.approx({2: 100.0})


def test_differences_are_paired_by_rows() -> None:
    easy = tuple(float(number % 2) for number in range(40))
    harder = easy[1:] + easy[:1]
    groups = {
        "mera": [make("mera", 0.9, rows=easy)],
        "same rows": [make("finetune", 0.8, rows=easy)],
        "other rows": [make("finetune", 0.8, rows=harder)],
    }
    found = by_label(compare_runs(groups, "mera", 500))
    # .4 and .8 x .9 of the drawn rows: their ratio to one another is the same in every draw
    paired = found["same rows"].differences["scores.image"]
    apart = found["other rows"].differences["scores.image"]
    assert paired.estimate == apart.estimate == pytest.approx(-0.04)
    assert paired.low is not None and paired.high is not None
    assert apart.low is not None and apart.high is not None
    assert paired.high < 0.0 < apart.high
    assert apart.high - apart.low > 5 * (paired.high - paired.low)


def test_text_has_an_interval_over_runs_alone() -> None:
    [one] = compare_runs({"mera": [make("mera", 1.0)]}, "mera", 200)
    assert ends(one.intervals["text_perplexity"]) == (60.0, None, None)
    [two] = compare_runs({"mera": [make("mera", 1.0, seed=s) for s in (0, 2)]}, "mera", 500)
    assert ends(two.intervals["text_perplexity"]) == (61.0, 60.0, 62.0)


def test_what_does_not_match_is_not_compared() -> None:
    mera = make("mera", 1.0)
    with pytest.raises(EvaluationError, match="same orders and seeds"):
        compare_runs({"mera": [mera], "lwf": [make("lwf", 1.0, seed=1)]}, None, 10)
    with pytest.raises(EvaluationError, match="different data"):
        compare_runs({"mera": [mera], "lwf": [replace(mera, data_md5="other")]}, None, 10)
    with pytest.raises(EvaluationError, match="same test rows"):
        compare_runs({"mera": [mera], "lwf": [make("lwf", 1.0, rows=(1.0,) * 9)]}, None, 10)


def test_what_is_undefined_has_no_rank_and_says_why() -> None:
    zero = make("ewc", 0.0, learned=0.0)
    methods = compare_runs({"ewc": [zero], "mera": [make("mera", 0.7)]}, "mera", 50)
    assert [(m.label, m.rank) for m in methods] == [("mera", 1), ("ewc", None)]
    assert methods[1].differences["brg"].estimate is None
    text = markdown(methods, "mera", TimeSpent({}))
    assert "No BRG of ewc: the score of image after stage 1 is zero" in text


def test_what_learned_next_to_nothing_has_no_rank() -> None:
    idle = make("connector-only", 1.0)
    few = tuple(
        replace(cell, examples=tuple(value / 10 for value in cell.examples))
        if cell.point == "final"
        else cell
        for cell in idle.cells
    )
    groups = {"connector-only": [replace(idle, cells=few)], "mera": [make("mera", 0.7)]}
    methods = compare_runs(groups, "mera", 50)
    assert [(m.label, m.rank) for m in methods] == [("mera", 1), ("connector-only", None)]
    assert methods[1].intervals["brg"].estimate == pytest.approx(100.0)
    assert "ranked by BRG where retention is 20" in markdown(methods, "mera", TimeSpent({}))


def _compared(labels: Mapping[str, float]) -> list[ComparedMethod]:
    groups = {
        label: [make(label, kept), make(label, kept - 0.1, BA)] for label, kept in labels.items()
    }
    groups["old"] = [
        replace(run, **dict.fromkeys((*COSTS, "idle_seconds"), None))
        for run in (make("old", 0.3), make("old", 0.2, BA))
    ]
    return compare_runs(groups, "mera", 200)


def test_tables_hold_every_number() -> None:
    methods = _compared({"mera": 1.0, "finetune": 0.5})
    time = TimeSpent({"training": 60.0, "evaluation": 20.0, "merging": 0.0}, 100.0, 20.0)
    assert time.shares() == pytest.approx(
        {"training": 0.6, "evaluation": 0.2, "merging": 0.0, "orchestration": 0.2}
    )
    text = markdown(methods, "mera", time)
    assert "| 2 | finetune | 45.0 [40.0, 50.0] |" in text
    assert "**-50.0** [-50.0, -50.0]" in text
    assert "| mera | 135 M | 512 k | 4.1 M | 640 | 1,234 | 16 | 6 | 2 | 0 | 2 |" in text
    assert "| old | – | – | – | – | – | 16 |" in text
    assert "training 60.0 %" in text and "orchestration 20.0 %" in text
    rows = {
        row["method"]: row for row in csv.DictReader(comparison_csv(methods, "mera").splitlines())
    }
    assert [float(rows["mera"][name]) for name in ("brg", "brg_low", "brg_high")] == pytest.approx(
        [95.0, 90.0, 100.0]
    )
    assert float(rows["finetune"]["brg_minus_mera_high"]) == pytest.approx(-50.0)
    assert rows["mera"]["replay_rows"] == "640.0"
    assert rows["old"]["replay_rows"] == ""
    assert rows["mera"]["orders"] == "image audio; audio image"


def test_the_page_needs_nothing_and_escapes_names() -> None:
    methods = _compared({"mera": 1.0, "<script>alert(1)</script> & co": 0.5})
    time = TimeSpent({"training": 60.0}, 100.0, 20.0)
    text = page("de<b>mo", methods, "mera", time, "abc")
    assert page("de<b>mo", methods, "mera", time, "abc") == text
    assert "://" not in text
    assert not re.search(r"<(script|link|img|iframe)\b", text)
    assert not re.search(r"(src|href)=\"(?!#)", text)
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; co" in text and "de&lt;b&gt;mo" in text
    assert text.count("<svg") == 3 + 1 + 3  # stages of three methods, frontier, orders of three
    used = set(re.findall(r"href=\"#([^\"]+)\"|url\(#([^)]+)\)", text))
    ids = re.findall(r"\bid=\"([^\"]+)\"", text)
    assert used and {a or b for a, b in used} <= set(ids)
    assert len(set(ids)) == len(ids)
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text
    assert "#0072b2" not in text[text.index("<svg") :]  # pictures follow the page's colours
    for fact in ("n = 16 test rows", "2 orders", "95 %"):
        assert fact in text


def test_initials_tell_modalities_apart() -> None:
    assert initials(("image", "infrared", "audio")) == {
        "image": "IM",
        "infrared": "IN",
        "audio": "A",
    }
