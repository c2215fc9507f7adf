"""MERA with the closed-form correction in place of realigning: no rows at all [ours]."""

from __future__ import annotations

from collections.abc import Sequence

from graftline.methods import Stage
from graftline.methods.mera import corrected, grow
from graftline.planning.plan import Planner
from graftline.planning.realigning import RealignPlanner


def mera_corrected(planner: Planner, order: Sequence[str]) -> list[Stage]:
    """After a merge its first layers read of each token what the old ones read."""
    steps = RealignPlanner.beside(planner)
    return grow(steps, order, steps.merge, lambda turn: corrected(steps, turn))
