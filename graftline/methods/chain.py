"""One modality after another, for methods that do without merging."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from graftline.methods import Stage, start
from graftline.planning.guarding import GuardPlanner
from graftline.planning.plan import Model, Planner

Learn = Callable[[GuardPlanner, Model, str, Sequence[Stage]], Model]
"""From the old model with the new modality's aligned connector, that modality, and the stages
before, to the next model."""


def chain(planner: Planner, order: Sequence[str], learn: Learn) -> list[Stage]:
    """Aligns and learns each modality in turn.

    Each stage's vanilla model is naive fine-tuning from the same start, for FRG alone, and by what
    all methods share: a method's own learning rate is not its measure's.
    """
    steps = GuardPlanner.beside(planner)
    model, stages = start(planner), list[Stage]()
    for index, modality in enumerate(order, start=1):
        connector = planner.align(model.backbone, modality, index)
        aligned = model.with_connector(modality, connector)
        model = learn(steps, aligned, modality, stages)
        vanilla = None
        if planner.recipe.evaluation.references:
            vanilla = planner.common().fine_tune(aligned, (modality,), index)
        stages.append(Stage(index, modality, final=model, vanilla=vanilla))
    return stages


def naive(planner: Planner, aligned: Model, modality: str) -> Model:
    """The first stage of methods that need something old: there is nothing to forget yet."""
    return planner.fine_tune(aligned, (modality,), 1)
