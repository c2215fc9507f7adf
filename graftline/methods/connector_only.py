"""Only connectors are trained: nothing can be forgotten, and the LLM learns nothing."""

from __future__ import annotations

from collections.abc import Sequence

from graftline.methods import Stage
from graftline.methods.chain import chain
from graftline.planning.guarding import GuardPlanner
from graftline.planning.plan import Model, Planner


def connector_only(planner: Planner, order: Sequence[str]) -> list[Stage]:
    """Align, then go on with the connector for as many steps as others fine-tune."""
    return chain(planner, order, _learn)


def _learn(planner: GuardPlanner, aligned: Model, modality: str, stages: Sequence[Stage]) -> Model:
    return planner.fine_tune(aligned, (modality,), len(stages) + 1, mode="connector")
