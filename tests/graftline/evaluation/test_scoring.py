"""Exact match and CIDEr-D, the latter against the paper's formula."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graftline.evaluation import EvaluationError
from graftline.evaluation.scoring import (
    cider_d_scores,
    exact_match,
    modality_score,
    normalise_answer,
    score_examples,
    score_rows,
    summarise,
    tokenise_caption,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  The  Cat. ", "cat"),
        ("a well-known piano!", "wellknown piano"),
        ("An apple, the pear", "apple pear"),
        ("theatre", "theatre"),
        ("“Grand” piano…", "grand piano"),
        ("CAFE\u0301", "café"),
        ("A", "a"),
        ("+", "+"),
        ("\u2003\u00a0seven\n", "seven"),
        ("", ""),
        (" \t ", ""),
    ],
)
def test_normalise_answer(text: str, expected: str) -> None:
    assert normalise_answer(text) == expected


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30))
def test_normalisation_never_fails_and_is_lower(text: str) -> None:
    once = normalise_answer(text)
    assert once == " ".join(once.split())
    assert bool(once) == bool(text.split())
    assert exact_match(text, [text]) == float(bool(text.split()))


def test_exact_match_takes_any_answer() -> None:
    assert exact_match("The drum.", ["piano", "a drum"]) == 1.0
    assert exact_match("drums", ["piano", "a drum"]) == 0.0
    assert exact_match("", ["A"]) == 0.0
    assert exact_match("the", ["A"]) == 0.0
    assert score_examples("question", ["7", "8"], [["7"], ["7", "seven"]]) == [1.0, 0.0]


def paper_cider_d(
    predictions: list[list[str]], references: list[list[list[str]]], sigma: float = 6.0
) -> list[float]:
    """CIDEr-D by the formula of Vedantam et al. 2015, slow and plain.

    Where the formula leaves a choice, as the authors' released code does: counts of n-grams
    instead of frequencies, and lengths counted in bigrams.
    """

    def grams(words: list[str], n: int) -> Counter[str]:
        return Counter(" ".join(words[i : i + n]) for i in range(len(words) - n + 1))

    def vector(words: list[str], n: int) -> dict[str, float]:
        weights = {}
        for gram, count in grams(words, n).items():
            documents = sum(any(gram in grams(r, n) for r in refs) for refs in references)
            weights[gram] = count * math.log(len(references) / max(1, documents))
        return weights

    def similarity(c: list[str], r: list[str], n: int) -> float:
        g_c, g_r = vector(c, n), vector(r, n)
        norm = math.hypot(*g_c.values(), 0.0) * math.hypot(*g_r.values(), 0.0)
        if norm == 0.0:
            return 0.0
        dot = sum(min(g_c.get(gram, 0.0), weight) * weight for gram, weight in g_r.items())
        delta = max(0, len(c) - 1) - max(0, len(r) - 1)
        return math.exp(-(delta**2) / (2 * sigma**2)) * dot / norm

    scores = []
    for words, refs in zip(predictions, references, strict=True):
        per_n = [10.0 / len(refs) * sum(similarity(words, r, n) for r in refs) for n in range(1, 5)]
        scores.append(sum(per_n) / 4)
    return scores


def test_cider_d_agrees_with_the_formula() -> None:
    generator = random.Random(7)
    words = ["low", "high", "note", "of", "bell", "piano", "drum", "chair", "round", "red", "three"]

    def caption() -> str:
        return " ".join(generator.choices(words, k=generator.randint(0, 9)))

    for references_each in (1, 3):
        predictions = [caption() for _ in range(12)]
        references = [
            [caption() or "bell" for _ in range(references_each)] for _ in range(len(predictions))
        ]
        predictions[0], references[0][0] = "red round chair of bell", "red round chair of bell"
        found = cider_d_scores(predictions, references)
        expected = paper_cider_d(
            [p.split() for p in predictions], [[r.split() for r in rs] for rs in references]
        )
        assert found == pytest.approx(expected, abs=1e-9)
        assert all(0.0 <= score <= 10.0 for score in found)


def test_cider_d_known_values() -> None:
    """A perfect caption of four words scores 10; of three, 7.5; a tenth of it as a score."""
    references = [["one two three four"], ["five six seven"], ["eight nine ten eleven twelve"]]
    predictions = ["One, two three FOUR.", "five six seven", ""]
    assert cider_d_scores(predictions, references) == pytest.approx([10.0, 7.5, 0.0])
    assert score_examples("caption", predictions, references) == pytest.approx([1.0, 0.75, 0.0])


@pytest.mark.parametrize(
    ("predictions", "references"),
    [
        ([], []),
        (["a red chair"], [["a red chair"]]),
        (["a red chair"] * 3, [["a red chair"]] * 3),
        (["", ""], [["..."], ["!"]]),
    ],
)
def test_cider_d_without_idf_is_zero(
    predictions: list[str], references: list[list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    assert cider_d_scores(predictions, references) == [0.0] * len(predictions)
    assert bool(caplog.records) == bool(predictions)


def test_empty_predictions_beside_good_ones() -> None:
    scores = cider_d_scores(["", "!!"], [["one two"], ["three four"]])
    assert scores == [0.0, 0.0]


def test_tokenise_caption() -> None:
    assert tokenise_caption("It\u2019s a left-hand, TALL chair…") == [
        "its",
        "a",
        "left",
        "hand",
        "tall",
        "chair",
    ]


def test_mixed_rows_and_summary() -> None:
    tasks = ["caption", "question", "caption", "question", "question"]
    predictions = ["one two three four", "7", "x", "8", "a nine"]
    references = [["one two three four"], ["7"], ["five six seven"], ["7"], ["nine"]]
    scores = score_rows(tasks, predictions, references)
    assert scores == pytest.approx([1.0, 1.0, 0.0, 0.0, 1.0])
    summary = summarise(zip(tasks, scores, strict=True))
    assert summary["question"] == {"metric": "exact_match", "score": pytest.approx(2 / 3), "n": 3}
    assert summary["caption"]["n"] == 2
    assert modality_score(summary) == pytest.approx((2 / 3 + 0.5) / 2)


def test_bad_input_is_named() -> None:
    with pytest.raises(EvaluationError, match="unknown task 'quiz'"):
        score_examples("quiz", ["a"], [["a"]])
    with pytest.raises(EvaluationError, match="example 1 has no reference"):
        score_examples("question", ["a", "b"], [["a"], []])
    with pytest.raises(EvaluationError, match="2 predictions for 1"):
        score_examples("caption", ["a", "b"], [["a"]])
    with pytest.raises(EvaluationError, match="one string"):
        score_examples("question", ["a"], ["a"])
    with pytest.raises(EvaluationError, match="no score"):
        modality_score({})
