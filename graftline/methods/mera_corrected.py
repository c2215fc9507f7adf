"""MERA with the closed-form correction in place of realigning: no rows at all [ours]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from graftline.methods import Stage
from graftline.methods.mera import Turn, grow
from graftline.plan import Model, Planner
from graftline.realign_plan import RealignPlanner


def mera_corrected(planner: Planner, order: Sequence[str]) -> list[Stage]:
    """After a merge its first layers read of each token what the old ones read."""
    steps = RealignPlanner.beside(planner)
    return grow(steps, order, steps.merge, lambda turn: corrected(steps, turn))


def corrected(planner: RealignPlanner, turn: Turn) -> Model:
    """The turn's model with every connector corrected."""
    connectors = {
        name: planner.correct(turn.model, name, turn.taught_by(name).backbone, turn.stage)
        for name in turn.model.connectors
    }
    return replace(turn.model, connectors=connectors)
