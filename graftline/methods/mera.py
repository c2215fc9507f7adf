"""MERA, "Merge then Realign" (Zhang et al., EMNLP 2025, arXiv 2503.07663), and its two halves."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from graftline.methods import Stage, add_modality, start
from graftline.planning.plan import Model, Planner, Reference
from graftline.planning.realigning import RealignPlanner


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
        ended: old modality -> the model at the end of the stage that learned it.
    """

    stage: int
    modality: str
    before: Model
    vanilla: Model
    model: Model
    learned: dict[str, Model]
    ended: Mapping[str, Model]

    def taught_by(self, modality: str) -> Model:
        """The model that a connector was trained in: the old one, or the new one's vanilla."""
        return self.vanilla if modality == self.modality else self.before


Merge = Callable[[Reference, Reference, int], Reference]
"""theta_{i-1}, theta_i^v and i to theta_i."""
Realign = Callable[[Turn], Model]


HALVES: Mapping[str, tuple[bool, bool]] = MappingProxyType(
    {"mera": (True, True), "merge-only": (True, False), "realign-only": (False, True)}
)
"""Method -> whether it takes MERA's third step, merging, and its fourth, realigning on replay."""


def mera(planner: Planner, order: Sequence[str]) -> list[Stage]:
    """Align, fine-tune, merge, realign every connector."""
    steps = RealignPlanner.beside(planner)
    return grow(steps, order, *halves_of("mera", steps, order))


def merge_only(planner: Planner, order: Sequence[str]) -> list[Stage]:
    """MERA without its fourth step: an ablation."""
    steps = RealignPlanner.beside(planner)
    return grow(steps, order, *halves_of("merge-only", steps, order))


def realign_only(planner: Planner, order: Sequence[str]) -> list[Stage]:
    """MERA without its third step: an ablation."""
    steps = RealignPlanner.beside(planner)
    return grow(steps, order, *halves_of("realign-only", steps, order))


def halves_of(
    method: str, planner: RealignPlanner, replayed: Collection[str]
) -> tuple[Merge | None, Realign | None]:
    """MERA's third and fourth step, `None` where the method leaves one out.

    Args:
        method: of `HALVES`.
        planner: makes the steps.
        replayed: modalities whose replay is there; connectors of others stay as they are.
    """
    merges, realigns = HALVES[method]
    return planner.merge if merges else None, _on_replay(planner, replayed) if realigns else None


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
    for index, modality in enumerate(order, start=1):
        stage = add_stage(planner, model, modality, index, merge, realign, stages)
        stages.append(stage)
        begun = stage.merged or stage.vanilla or stage.final
        model = Model(begun.backbone, stage.final.connectors)
    return stages


def add_stage(
    planner: Planner,
    before: Model,
    modality: str,
    index: int,
    merge: Merge | None,
    realign: Realign | None,
    stages: Sequence[Stage],
) -> Stage:
    """One stage: what makes theta_i and its connectors of theta_{i-1} and a new modality.

    Args:
        planner: makes the steps.
        before: theta_{i-1} with its connectors.
        modality: what is new.
        index: i, from 1.
        merge: the third step, taken from the second stage on; `None` leaves it out.
        realign: the fourth step, likewise.
        stages: those before, as far as they are known.
    """
    vanilla = add_modality(planner, before, modality, index)
    final, merged = vanilla, None
    if index > 1:
        if merge is not None:
            backbone = merge(before.backbone, vanilla.backbone, index)
            final = merged = Model(backbone, vanilla.connectors)
        if realign is not None:
            learned = {stage.modality: stage.vanilla or stage.final for stage in stages}
            learned[modality] = vanilla
            ended = {stage.modality: stage.final for stage in stages}
            final = realign(Turn(index, modality, before, vanilla, final, learned, ended))
    return Stage(index, modality, final, vanilla, merged)


def _on_replay(planner: RealignPlanner, replayed: Collection[str]) -> Realign:
    """Connectors on their own replay; independent of each other, so in any order."""

    def realign(turn: Turn) -> Model:
        model = turn.model
        if planner.recipe.realign.start == "corrected":
            model = corrected(planner, turn, replayed)
        connectors = {
            name: planner.realign(model, name, turn.stage) if name in replayed else connector
            for name, connector in model.connectors.items()
        }
        return Model(model.backbone, connectors)

    return realign


def corrected(
    planner: RealignPlanner, turn: Turn, modalities: Collection[str] | None = None
) -> Model:
    """The turn's model with connectors corrected in closed form [ours]; all, if none are named."""
    connectors = {
        name: planner.correct(turn.model, name, turn.taught_by(name).backbone, turn.stage)
        if modalities is None or name in modalities
        else connector
        for name, connector in turn.model.connectors.items()
    }
    return replace(turn.model, connectors=connectors)
