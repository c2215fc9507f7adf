"""Scores of answers, example by example, on one scale from 0 to 1.

Questions are scored by exact match after SQuAD's normalisation (Rajpurkar et al. 2016),
captions by CIDEr-D (Vedantam et al. 2015, arXiv 1411.5726) as `aac_metrics` computes it. CIDEr-D
runs from 0 to 10; it is divided by 10 here, so that both tasks weigh alike in a modality's mean
[our own choice].

What to know about CIDEr-D before reading its numbers:

- The weights of n-grams (idf) come from the references of the examples scored together. Two
  models are comparable only when scored on the same test set; a score of a sample of the set is
  another number.
- n runs from 1 to 4: a perfect caption of fewer than four words has no 4-grams and stays below
  1 (three words: at most .75).
- An n-gram that stands in the references of every example has idf 0 and counts for nothing. If
  all references are identical, or only one example is scored, every idf is 0 and so is every
  score, perfect answers included. That is the formula's answer; a warning is logged.
- An empty prediction scores 0.
"""

from __future__ import annotations

import logging
import re
import string
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import TypedDict

from graftline.evaluation import EvaluationError

logger = logging.getLogger(__name__)

QUESTION = "question"
CAPTION = "caption"
JOINT_TASKS: Mapping[int, str] = {2: "two media", 3: "three media"}
"""Questions with so many media before them."""
METRICS: Mapping[str, str] = {
    QUESTION: "exact_match",
    CAPTION: "cider_d_over_10",
    **dict.fromkeys(JOINT_TASKS.values(), "exact_match"),
}
CIDER_SCALE = 10.0

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_APOSTROPHES = frozenset("'`\u2019\u02bc")


class TaskScore(TypedDict):
    """Mean score of one task: the metric's name, the mean (0..1), the number of examples."""

    metric: str
    score: float
    n: int


def normalise_answer(text: str) -> str:
    """SQuAD's answer normalisation: lower case, no punctuation, no articles, single spaces.

    Beyond SQuAD [our own choice]: punctuation means Unicode's too; equal letters in different
    Unicode compositions become equal; and an answer that would vanish (the option "A", the sign
    "+") keeps its article or, failing that, its punctuation, so that silence never matches it.

    Args:
        text: Any string.

    Returns:
        The normalised string; empty only for blank text.
    """
    lowered = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).lower())
    bare = "".join(c for c in lowered if not _is_punctuation(c))
    for candidate in (_ARTICLES.sub(" ", bare), bare, lowered):
        joined = " ".join(candidate.split())
        if joined:
            return joined
    return ""


def tokenise_caption(text: str) -> list[str]:
    """Words of a caption: lower case, apostrophes dropped, other punctuation as a gap.

    It stands in for the Penn Treebank tokeniser of the original evaluation, which needs Java.

    Args:
        text: Any string.

    Returns:
        The words; empty if there are none.
    """
    lowered = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).lower())
    return "".join(
        "" if c in _APOSTROPHES else " " if _is_punctuation(c) else c for c in lowered
    ).split()


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the normalised prediction equals one of the normalised answers, else 0.0."""
    predicted = normalise_answer(prediction)
    return float(bool(predicted) and any(predicted == normalise_answer(a) for a in answers))


def cider_d_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each prediction, from 0 to 10; see the module's notes.

    Args:
        predictions: One caption an example.
        references: One or more reference captions an example; idf is counted over all of them.

    Returns:
        One score an example.

    Raises:
        EvaluationError: The lengths differ, or an example has no reference.
    """
    _check(predictions, references)
    hypotheses = [" ".join(tokenise_caption(p)) for p in predictions]
    targets = [[" ".join(tokenise_caption(r)) for r in several] for several in references]
    if len({frozenset(several) for several in targets}) < 2:
        if targets:
            logger.warning(
                "CIDEr-D over %d example(s) with one and the same references: every idf is 0, "
                "so every score is 0; score at least two examples with different references",
                len(targets),
            )
        return [0.0] * len(hypotheses)
    # Imported late: the package loads transformers and sentence-transformers (seconds).
    from aac_metrics.functional import cider_d  # type: ignore[import-untyped, unused-ignore]

    _, per_example = cider_d(hypotheses, targets, return_all_scores=True)
    return [float(score) for score in per_example["cider_d"].tolist()]


def score_examples(
    task: str, predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> list[float]:
    """Scores of one task's examples, from 0 to 1.

    Args:
        task: `question`, `two media`, `three media` (exact match), or `caption` (CIDEr-D / 10).
        predictions: One answer an example.
        references: One or more right answers an example.

    Returns:
        One score an example, in the order given.

    Raises:
        EvaluationError: The task is unknown, the lengths differ, or an example has no reference.
    """
    if task not in METRICS:
        raise EvaluationError(f"unknown task {task!r}: one of {sorted(METRICS)}")
    _check(predictions, references)
    if METRICS[task] == METRICS[QUESTION]:
        return [exact_match(p, a) for p, a in zip(predictions, references, strict=True)]
    return [score / CIDER_SCALE for score in cider_d_scores(predictions, references)]


def score_rows(
    tasks: Sequence[str], predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> list[float]:
    """Scores of one modality's examples of mixed tasks, in the order given.

    Each task is scored by itself: idf comes from the captions' references only.

    Args:
        tasks: The task of each example.
        predictions: One answer an example.
        references: One or more right answers an example.

    Returns:
        One score an example, from 0 to 1.

    Raises:
        EvaluationError: As for `score_examples`.
    """
    _check(predictions, references)
    if len(tasks) != len(predictions):
        raise EvaluationError(f"{len(tasks)} tasks for {len(predictions)} predictions")
    scores = [0.0] * len(tasks)
    for task in sorted(set(tasks)):
        rows = [row for row, name in enumerate(tasks) if name == task]
        found = score_examples(task, [predictions[r] for r in rows], [references[r] for r in rows])
        for row, score in zip(rows, found, strict=True):
            scores[row] = score
    return scores


def summarise(rows: Iterable[tuple[str, float]]) -> dict[str, TaskScore]:
    """Mean score of each task.

    Args:
        rows: `(task, score)` of each example of one modality.

    Returns:
        `{task: {"metric", "score", "n"}}`, sorted by task.

    Raises:
        EvaluationError: A task is unknown.
    """
    by_task: dict[str, list[float]] = {}
    for task, score in rows:
        if task not in METRICS:
            raise EvaluationError(f"unknown task {task!r}: one of {sorted(METRICS)}")
        by_task.setdefault(task, []).append(score)
    return {
        task: {"metric": METRICS[task], "score": sum(scores) / len(scores), "n": len(scores)}
        for task, scores in sorted(by_task.items())
    }


def modality_score(summary: Mapping[str, TaskScore]) -> float:
    """A modality's score: the mean over tasks of the task means, whatever their sizes.

    Raises:
        EvaluationError: There is no task.
    """
    if not summary:
        raise EvaluationError("a modality without scored tasks has no score: evaluate it first")
    return sum(task["score"] for task in summary.values()) / len(summary)


def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character).startswith("P")


def _check(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if len(predictions) != len(references):
        raise EvaluationError(f"{len(predictions)} predictions for {len(references)} examples")
    for row, answers in enumerate(references):
        if isinstance(answers, str):
            raise EvaluationError(f"the references of example {row} are one string: give a list")
        if not answers:
            raise EvaluationError(f"example {row} has no reference answer: every row needs one")
