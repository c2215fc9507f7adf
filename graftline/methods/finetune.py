"""Naive fine-tuning of one modality after another: the disease that the others treat."""

from __future__ import annotations

from collections.abc import Sequence

from graftline.methods import Stage, add_modality, start
from graftline.planning.plan import Planner


def finetune(planner: Planner, order: Sequence[str]) -> list[Stage]:
    """Each stage's final model is its vanilla model."""
    model, stages = start(planner), []
    for index, modality in enumerate(order, start=1):
        model = add_modality(planner, model, modality, index)
        stages.append(Stage(index, modality, final=model, vanilla=model))
    return stages
