"""`mera+`: MERA with the best of what lies beyond it, at most 1 % replay [ours].

What it is made of stands in the recipe's `mera_plus`, chosen on validation rows; see
docs/beyond.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from graftline.methods import Stage
from graftline.methods.mera import Turn, corrected, grow
from graftline.methods.mera_distilled import distilled
from graftline.planning.plan import Model, Planner, Reference
from graftline.planning.realigning import RealignPlanner


def mera_plus(planner: Planner, order: Sequence[str]) -> list[Stage]:
    """Merge by the chosen coefficients, correct if chosen, distil from the old model."""
    steps, chosen = RealignPlanner.beside(planner), planner.recipe.mera_plus

    def merge(previous: Reference, vanilla: Reference, stage: int) -> Reference:
        if chosen.coefficient is None and chosen.depth == 0.0:
            return steps.merge(previous, vanilla, stage)
        return steps.merge_by(previous, vanilla, stage, chosen.coefficient, chosen.depth)

    def realign(turn: Turn) -> Model:
        begun = replace(turn, model=corrected(steps, turn)) if chosen.correct else turn
        return distilled(steps, begun, chosen.replay)

    return grow(steps, order, merge, realign)
