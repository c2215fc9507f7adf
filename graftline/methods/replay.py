"""Experience replay (Robins 1995; Chaudhry et al., arXiv 1902.10486): old rows among the new."""

from __future__ import annotations

from collections.abc import Sequence

from graftline.methods import Stage
from graftline.methods.chain import chain, naive
from graftline.planning.guarding import Guard, GuardPlanner
from graftline.planning.plan import Model, Planner


def replay(planner: Planner, order: Sequence[str]) -> list[Stage]:
    """The share `replay.fraction` of each earlier modality's rows joins every fine-tuning.

    Old connectors learn on their rows too, as they do when MERA realigns them.
    """
    return chain(planner, order, _learn)


def _learn(planner: GuardPlanner, aligned: Model, modality: str, stages: Sequence[Stage]) -> Model:
    if not stages:
        return naive(planner, aligned, modality)
    guard = Guard("replay", replayed=tuple(stage.modality for stage in stages))
    return planner.guarded_fine_tune(aligned, modality, len(stages) + 1, guard)
