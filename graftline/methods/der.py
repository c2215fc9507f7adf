"""Dark experience replay, DER++ (Buzzega et al., arXiv 2004.07211): old rows with old logits."""

from __future__ import annotations

from collections.abc import Sequence

from graftline.methods import Stage
from graftline.methods.chain import chain, naive
from graftline.planning.guarding import Guard, GuardPlanner
from graftline.planning.plan import Model, Planner


def der(planner: Planner, order: Sequence[str]) -> list[Stage]:
    """Beside each batch as many replayed rows, on which logits and answers are to stay.

    The logits are those that a row's answer had at the end of the stage that learned it [ours: the
    paper samples them along the trajectory], kept on disk: on the starter some 0.2 GB a modality.
    """
    return chain(planner, order, _learn)


def _learn(planner: GuardPlanner, aligned: Model, modality: str, stages: Sequence[Stage]) -> Model:
    if not stages:
        return naive(planner, aligned, modality)
    told = {
        f"logits.{stage.modality}": planner.logits(stage.final, stage.modality, stage.index)
        for stage in stages
    }
    replayed = tuple(stage.modality for stage in stages)
    guard = Guard("der", planner.recipe.rivals.der.model_dump(), replayed, told)
    return planner.guarded_fine_tune(aligned, modality, len(stages) + 1, guard)
