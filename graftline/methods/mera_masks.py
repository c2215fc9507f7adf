"""MERA, then masks: the chain's task vectors decoupled by modality, then realigned [ours].

The model that learned modality j is theta_j^v, and `tau_j = theta_j^v - theta_0` is the sum of what
the stages up to j have changed on its way. MMER (Li et al., ACL 2025) merges these vectors and
keeps a mask a modality; a prompt with media of one modality meets that modality's decoupled
weights, and its connector is realigned beside them. The chain itself goes on from MERA's merge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from graftline.methods import Stage
from graftline.methods.mera import Turn, grow
from graftline.planning.plan import Model, Planner
from graftline.planning.realigning import RealignPlanner


def mera_masks(planner: Planner, order: Sequence[str]) -> list[Stage]:
    """MERA's chain; at each stage's end masks, and connectors realigned on their replay."""
    steps = RealignPlanner.beside(planner)

    def realign(turn: Turn) -> Model:
        model = replace(steps.decouple(turn.learned), connectors=turn.model.connectors)
        connectors = {
            name: steps.realign_masked(model, name, turn.stage) for name in model.connectors
        }
        return replace(model, connectors=connectors)

    return grow(steps, order, steps.merge, realign)
