"""Elastic weight consolidation (Kirkpatrick et al. 2017, arXiv 1612.00796).

In its online form (Schwarz et al. 2018, arXiv 1805.06370): one running Fisher, one anchor.
"""

from __future__ import annotations

from collections.abc import Sequence

from graftline.methods import Stage
from graftline.methods.chain import chain, naive
from graftline.planning.guarding import Guard, GuardPlanner
from graftline.planning.plan import Model, Planner, Reference


def ewc(planner: Planner, order: Sequence[str]) -> list[Stage]:
    """Weights of the backbone that matter to earlier stages are held near theta_{i-1}.

    `lambda / 2 * sum_k F_k (theta_k - theta_{i-1,k})^2` joins the loss, with
    `F = F_{i-1} + gamma F_{i-2} + ...`; nothing is replayed.
    """
    return chain(planner, order, _learn)


def _learn(planner: GuardPlanner, aligned: Model, modality: str, stages: Sequence[Stage]) -> Model:
    fisher: Reference | None = None
    for stage in stages:
        fisher = planner.fisher(stage.final, stage.modality, stage.index, fisher)
    if fisher is None:
        return naive(planner, aligned, modality)
    settings = {"strength": planner.recipe.rivals.ewc.strength}
    guard = Guard("ewc", settings, parents={"fisher": fisher})
    return planner.guarded_fine_tune(aligned, modality, len(stages) + 1, guard)
