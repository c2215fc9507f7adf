"""Only the self-attention of the LLM learns ("How to teach LMMs new skills", arXiv 2510.08564)."""

from __future__ import annotations

from collections.abc import Sequence

from graftline.methods import Stage
from graftline.methods.chain import chain
from graftline.planning.guarding import Guard, GuardPlanner
from graftline.planning.plan import Model, Planner


def attention_only(planner: Planner, order: Sequence[str]) -> list[Stage]:
    """Fine-tuning of the query, key, value and output projections, and of the new connector."""
    return chain(planner, order, _learn)


def _learn(planner: GuardPlanner, aligned: Model, modality: str, stages: Sequence[Stage]) -> Model:
    guard = Guard("attention-only", mode="attention")
    return planner.guarded_fine_tune(aligned, modality, len(stages) + 1, guard)
