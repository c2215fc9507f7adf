"""MERA, "Merge then Realign" (Zhang et al., EMNLP 2025, arXiv 2503.07663), and its two halves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from graftline.methods import Stage, add_modality, start
from graftline.plan import Model, Planner, Reference
from graftline.realign_plan import RealignPlanner


@dataclass(frozen=True)
class Turn:
    """What there is when a stage's model is to be realigned.

    Attributes:
        stage: i, from 2.
        modality: the new one.
        before: the model at the end of the stage before.
        vanilla: after naive fine-tuning.
        model: the backbone that connectors are realigned to, and the connectors as they are.
        learned: modality -> the vanilla model of the stage that learned it, the new one's too.
    """

    stage: int
    modality: str
    before: Model
    vanilla: Model
    model: Model
    learned: dict[str, Model]

    def taught_by(self, modality: str) -> Model:
        """The model that a connector was trained in: the old one, or the new one's vanilla."""
        return self.vanilla if modality == self.modality else self.before


Merge = Callable[[Reference, Reference, int], Reference]
"""theta_{i-1}, theta_i^v and i to theta_i."""
Realign = Callable[[Turn], Model]


def mera(planner: Planner, order: Sequence[str]) -> list[Stage]:
    """Align, fine-tune, merge, realign every connector."""
    steps = RealignPlanner.beside(planner)
    return grow(steps, order, steps.merge, _on_replay(steps))


def merge_only(planner: Planner, order: Sequence[str]) -> list[Stage]:
    """MERA without its fourth step: an ablation."""
    steps = RealignPlanner.beside(planner)
    return grow(steps, order, steps.merge, None)


def realign_only(planner: Planner, order: Sequence[str]) -> list[Stage]:
    """MERA without its third step: an ablation."""
    steps = RealignPlanner.beside(planner)
    return grow(steps, order, None, _on_replay(steps))


def grow(
    planner: Planner, order: Sequence[str], merge: Merge | None, realign: Realign | None
) -> list[Stage]:
    """Stage after stage: align, fine-tune, and from the second on merge and realign.

    Args:
        planner: makes the steps.
        order: the modalities.
        merge: the third step; `None` leaves it out.
        realign: the fourth step; `None` leaves it out. What it changes of the backbone is this
            stage's alone: the next one starts from the merged backbone.
    """
    model, stages = start(planner), list[Stage]()
    learned: dict[str, Model] = {}
    for index, modality in enumerate(order, start=1):
        vanilla = add_modality(planner, model, modality, index)
        learned = {**learned, modality: vanilla}
        final, merged = vanilla, None
        if index > 1:
            if merge is not None:
                backbone = merge(model.backbone, vanilla.backbone, index)
                final = merged = Model(backbone, vanilla.connectors)
            if realign is not None:
                final = realign(Turn(index, modality, model, vanilla, final, learned))
        stages.append(Stage(index, modality, final, vanilla, merged))
        model = Model((merged or vanilla).backbone, final.connectors)
    return stages


def _on_replay(planner: RealignPlanner) -> Realign:
    """Every connector on its own replay; independent of each other, so in any order."""

    def realign(turn: Turn) -> Model:
        model = turn.model
        connectors = {name: planner.realign(model, name, turn.stage) for name in model.connectors}
        return Model(model.backbone, connectors)

    return realign
