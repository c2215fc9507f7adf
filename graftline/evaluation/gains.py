"""Relative gains: how much a growing model keeps of what it knew, and how well it learns.

Notation: `S[i][m]` is the final score of modality m on its test set after
stage i (stages count from 1), `V[m]` the score of the vanilla model of m's stage on m, `E[m]`
the score of the expert for m. The modality of stage i is `order[i - 1]`. All scores are finite
and not negative, in any unit that is the same for the two sides of a ratio.

Definitions (BRG and FRG: the paper of MERA, "Merge then Realign", arXiv 2503.07663, EMNLP
2025, as its re-implementation has them for two modalities; that BRG divides by S[j][j] beyond
the first is ours; retention: our own, against experts, so that a weak stage cannot hide behind
a ratio):

    BRG_i     = 100 / (i - 1) * sum_{j < i} S[i][m_j] / S[j][m_j]     for i >= 2
    FRG_i     = 100 * S[i][m_i] / V[m_i]
    retention = 100 / N * sum_j S[N][m_j] / E[m_j]

The headlines are BRG_N and the mean of FRG_i over i >= 2; the mean of BRG_i over i >= 2 stands
beside them. 100 means that nothing was lost; more than 100 means that something was gained.

A ratio to a score of zero is undefined. It is never infinite, NaN or left out of a mean: the
whole gain is then `None` and carries the reason.

Example:
    Three modalities. Image scores .80, then .76 and .72; audio .90, then .81; point cloud .95.

    >>> S = {1: {"image": 0.80}, 2: {"image": 0.76, "audio": 0.90},
    ...      3: {"image": 0.72, "audio": 0.81, "point_cloud": 0.95}}
    >>> order = ["image", "audio", "point_cloud"]
    >>> round(brg(2, S, order).value, 6)    # 100 * .76/.80
    95.0
    >>> round(brg(3, S, order).value, 6)    # 100/2 * (.72/.80 + .81/.90)
    90.0
    >>> V = {"image": 0.80, "audio": 0.90, "point_cloud": 1.00}
    >>> [round(frg(i, S, V, order).value, 6) for i in (1, 2, 3)]
    [100.0, 100.0, 95.0]
    >>> E = {"image": 0.90, "audio": 0.90, "point_cloud": 1.00}
    >>> round(retention(S, E, order).value, 6)    # 100/3 * (.72/.90 + .81/.90 + .95/1.00)
    88.333333
    >>> brg(2, {1: {"image": 0.0}, 2: {"image": 0.5}}, order).reason
    'the score of image after stage 1 is zero: a ratio to it is undefined'
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from graftline.evaluation import EvaluationError

StageScores = Mapping[int, Mapping[str, float]]
ModalityScores = Mapping[str, float]


@dataclass(frozen=True)
class Gain:
    """A gain in per cent, or why there is none.

    Attributes:
        value: Per cent, finite; `None` if undefined.
        reason: Why `value` is `None`; `None` if it is defined.
    """

    value: float | None
    reason: str | None = None

    def __post_init__(self) -> None:
        if (self.value is None) == (self.reason is None):
            raise EvaluationError("a gain has either a value or a reason why it has none")


@dataclass(frozen=True)
class Gains:
    """Every gain of one run; see the module's definitions."""

    brg: Gain
    brg_mean: Gain
    brg_per_stage: Mapping[int, Gain]
    frg_mean: Gain
    frg_per_stage: Mapping[int, Gain]
    retention: Gain


def brg(stage: int, scores: StageScores, order: Sequence[str]) -> Gain:
    """Backward Relative Gain after one stage.

    `BRG_i = 100 / (i - 1) * sum_{j < i} S[i][m_j] / S[j][m_j]` (arXiv 2503.07663).

    Args:
        stage: i, from 1 to `len(order)`. At 1 nothing is older, so the gain is undefined.
        scores: `S[i][m]`.
        order: The modality of each stage.

    Returns:
        The gain in per cent; undefined where some `S[j][m_j]` is zero.

    Raises:
        EvaluationError: `stage` is outside the order, or a needed score is missing, negative or
            not finite.
    """
    _check_stage(stage, order)
    if stage == 1:
        return Gain(None, "BRG compares with earlier modalities: stage 1 has none")
    ratios = [
        _ratio(
            _stage_score(scores, stage, modality),
            _stage_score(scores, earlier, modality),
            f"the score of {modality} after stage {earlier}",
        )
        for earlier, modality in enumerate(order[: stage - 1], start=1)
    ]
    return _mean(ratios)


def frg(stage: int, scores: StageScores, vanilla: ModalityScores, order: Sequence[str]) -> Gain:
    """Forward Relative Gain of one stage: `FRG_i = 100 * S[i][m_i] / V[m_i]`.

    Stage 1 starts from the untouched base, so its model is vanilla itself: without a `V` for
    it FRG_1 is 100 by definition. FRG_1 never enters a headline.

    Args:
        stage: i, from 1 to `len(order)`.
        scores: `S[i][m]`.
        vanilla: `V[m]`, the score on m of the naively fine-tuned model of m's stage.
        order: The modality of each stage.

    Returns:
        The gain in per cent; undefined where `V[m_i]` is zero.

    Raises:
        EvaluationError: As for `brg`.
    """
    _check_stage(stage, order)
    modality = order[stage - 1]
    if stage == 1 and modality not in vanilla:
        return Gain(100.0)
    reference = _modality_score(vanilla, modality, "vanilla")
    return _ratio(
        _stage_score(scores, stage, modality), reference, f"the vanilla score of {modality}"
    )


def retention(scores: StageScores, experts: ModalityScores, order: Sequence[str]) -> Gain:
    """Share of the experts' scores that the last model holds.

    `retention = 100 / N * sum_j S[N][m_j] / E[m_j]` (our own definition).

    Args:
        scores: `S[i][m]`; only the last stage, `len(order)`, is used.
        experts: `E[m]`.
        order: The modality of each stage; retention does not depend on the order.

    Returns:
        The gain in per cent; undefined where some `E[m]` is zero.

    Raises:
        EvaluationError: As for `brg`.
    """
    last = len(order)
    _check_stage(last, order)
    return _mean(
        _ratio(
            _stage_score(scores, last, modality),
            _modality_score(experts, modality, "expert"),
            f"the expert's score of {modality}",
        )
        for modality in order
    )


def mean_gain(per_stage: Mapping[int, Gain]) -> Gain:
    """Mean of a gain over the stages from the second on; undefined if any of them is."""
    later = [gain for stage, gain in sorted(per_stage.items()) if stage >= 2]
    if not later:
        return Gain(None, "the mean runs over the stages from the second on: there are none")
    return _mean(later)


def all_gains(
    scores: StageScores,
    order: Sequence[str],
    *,
    vanilla: ModalityScores | None = None,
    experts: ModalityScores | None = None,
) -> Gains:
    """Every gain of one run.

    Args:
        scores: `S[i][m]`. If it holds the last stage only (methods without stages, such as
            `joint`), BRG and FRG are undefined; if it holds more, it must hold all that the
            gains need.
        order: The modality of each stage, without repetition.
        vanilla: `V[m]`; `None` if the method has no vanilla models.
        experts: `E[m]`; `None` if no experts were evaluated.

    Returns:
        The gains; each undefined one carries its reason.

    Raises:
        EvaluationError: As for `brg`, or a modality stands twice in the order.
    """
    stages = range(1, len(order) + 1)
    _check_stage(len(order), order)
    if len(set(order)) != len(order):
        raise EvaluationError(f"a modality stands twice in the order {list(order)}")
    staged = len(order) == 1 or any(stage < len(order) for stage in scores)
    no_stages = Gain(None, "the method has no stages: only its last model was scored")
    no_vanilla = Gain(None, "no vanilla model was scored")
    no_experts = Gain(None, "no expert was scored")
    backward = {i: brg(i, scores, order) if staged else no_stages for i in stages if i >= 2}
    forward: dict[int, Gain] = {}
    for i in stages:
        if not staged:
            forward[i] = no_stages
        elif vanilla is None and i >= 2:
            forward[i] = no_vanilla
        else:
            forward[i] = frg(i, scores, vanilla or {}, order)
    return Gains(
        brg=backward[len(order)] if len(order) >= 2 else brg(1, scores, order),
        brg_mean=mean_gain(backward),
        brg_per_stage=backward,
        frg_mean=mean_gain(forward),
        frg_per_stage=forward,
        retention=retention(scores, experts, order) if experts is not None else no_experts,
    )


def _ratio(score: float, reference: float, name: str) -> Gain:
    if reference == 0.0:
        return Gain(None, f"{name} is zero: a ratio to it is undefined")
    ratio = 100.0 * score / reference
    if not math.isfinite(ratio):
        return Gain(None, f"{name} is too small ({reference!r}): a ratio to it overflows")
    return Gain(ratio)


def _mean(gains: Iterable[Gain]) -> Gain:
    values: list[float] = []
    for gain in gains:
        if gain.value is None:
            return gain
        values.append(gain.value)
    return Gain(math.fsum(values) / len(values))


def _check_stage(stage: int, order: Sequence[str]) -> None:
    if not order:
        raise EvaluationError("the order of modalities is empty: name at least one modality")
    if not 1 <= stage <= len(order):
        raise EvaluationError(
            f"stage {stage} is outside 1..{len(order)}, the stages of {list(order)}"
        )


def _stage_score(scores: StageScores, stage: int, modality: str) -> float:
    row = scores.get(stage)
    if row is None or modality not in row:
        raise EvaluationError(
            f"no score of {modality} after stage {stage}: evaluate the model of stage {stage} "
            f"on {modality} first"
        )
    return _checked(row[modality], f"the score of {modality} after stage {stage}")


def _modality_score(scores: ModalityScores, modality: str, kind: str) -> float:
    if modality not in scores:
        raise EvaluationError(
            f"no {kind} score of {modality}: evaluate the {kind} model of {modality} first"
        )
    return _checked(scores[modality], f"the {kind} score of {modality}")


def _checked(score: float, name: str) -> float:
    if not (math.isfinite(score) and score >= 0.0):
        raise EvaluationError(f"{name} is {score!r}: scores are finite and not negative")
    return score
