"""MERA whose connectors are realigned from the old model, without kept rows [ours]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from graftline.methods import Stage
from graftline.methods.mera import Turn, grow
from graftline.planning.plan import Model, Planner
from graftline.planning.realigning import RealignPlanner


def mera_distilled(planner: Planner, order: Sequence[str]) -> list[Stage]:
    """Old connectors learn from what was recorded of their modality's media, and from no row."""
    steps = RealignPlanner.beside(planner)
    return grow(steps, order, steps.merge, lambda turn: distilled(steps, turn, 0.0))


def distilled(planner: RealignPlanner, turn: Turn, replay: float) -> Model:
    """The turn's model with each old connector realigned from a model that has its modality.

    The new one's learns as `distil.own` says.

    Args:
        planner: makes the steps.
        turn: the stage.
        replay: share of each modality's rows that is seen beside what is drawn.
    """
    connectors, own, teacher = {}, planner.recipe.distil.own, planner.recipe.distil.teacher
    for name in turn.model.connectors:
        if name == turn.modality and own == "answers":
            connectors[name] = planner.realign(turn.model, name, turn.stage, on_all=True)
            continue
        statistics, share = None, 0.0
        if name != turn.modality or own == "drawn":
            stage = 1 + list(turn.learned).index(name)
            statistics = planner.statistics(_recorded(planner, turn, name), name, stage)
            share = replay
        first = turn.ended.get(name) if teacher == "first" else None
        old = first or turn.taught_by(name)
        connectors[name] = planner.distil(turn.model, name, turn.stage, old, statistics, share)
    return replace(turn.model, connectors=connectors)


def _recorded(planner: RealignPlanner, turn: Turn, modality: str) -> Model:
    """The model whose connector's inner vectors stay what they are.

    That of naive fine-tuning, as later steps train last layers alone; unless all of the connector
    was realigned at its own stage, whose end is recorded then.
    """
    all_learns = planner.recipe.realign.part == "all" and planner.recipe.distil.own == "answers"
    ended = turn.ended.get(modality) if all_learns else None
    return ended or turn.learned[modality]
