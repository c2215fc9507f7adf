"""Experts: one model for each modality, each trained from theta_0 on that modality alone."""

from __future__ import annotations

from collections.abc import Sequence

from graftline.methods import Stage, add_modality, start
from graftline.planning.plan import Model, Planner


def experts(planner: Planner, order: Sequence[str]) -> list[Stage]:
    """No chain at all: the run measures the experts, which every run does."""
    del planner, order
    return []


def expert(planner: Planner, modality: str) -> Model:
    """The expert of one modality, whose score `E[j]` is what retention is measured against."""
    return add_modality(planner, start(planner), modality, 0)
