"""Dark experience replay, DER++ (Buzzega et al., arXiv 2004.07211): old rows with old logits."""

from __future__ import annotations

from collections.abc import Sequence

from graftline.methods import Stage
from graftline.methods.chain import chain, naive
from graftline.plan import Guard, Model, Planner


def der(planner: Planner, order: Sequence[str]) -> list[Stage]:
    """Beside each batch as many replayed rows, on which logits and answers are to stay.

    The paper stores the logits that a row had when it was learned. Here theta_{i-1} gives them
    anew at every stage: with a vocabulary of 49,152 the stored ones would take more than the
    model.
    """
    return chain(planner, order, _learn)


def _learn(planner: Planner, aligned: Model, modality: str, stages: Sequence[Stage]) -> Model:
    if not stages:
        return naive(planner, aligned, modality)
    replayed = tuple(stage.modality for stage in stages)
    guard = Guard("der", planner.recipe.rivals.der.model_dump(), replayed)
    return planner.guarded_fine_tune(aligned, modality, len(stages) + 1, guard)
