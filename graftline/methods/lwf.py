"""Learning without forgetting (Li & Hoiem, arXiv 1606.09282): distillation, and nothing kept."""

from __future__ import annotations

from collections.abc import Sequence

from graftline.methods import Stage
from graftline.methods.chain import chain, naive
from graftline.planning.guarding import Guard, GuardPlanner
from graftline.planning.plan import Model, Planner


def lwf(planner: Planner, order: Sequence[str]) -> list[Stage]:
    """On the new modality's rows the model is to go on saying what theta_{i-1} says of them.

    The teacher is theta_{i-1} beside the new modality's aligned connector, frozen; the two are
    compared at the answers' positions.
    """
    return chain(planner, order, _learn)


def _learn(planner: GuardPlanner, aligned: Model, modality: str, stages: Sequence[Stage]) -> Model:
    if not stages:
        return naive(planner, aligned, modality)
    guard = Guard("lwf", planner.recipe.rivals.lwf.model_dump())
    return planner.guarded_fine_tune(aligned, modality, len(stages) + 1, guard)
