"""All modalities at once, with all their data, which no chain may use: often called the bound."""

from __future__ import annotations

from collections.abc import Sequence

from graftline.methods import Stage, start
from graftline.planning.plan import Planner


def joint(planner: Planner, order: Sequence[str]) -> list[Stage]:
    """One stage: align each connector to theta_0, then fine-tune on everything together.

    Modalities go in by name: what learns them all at once is the same model in every order.
    """
    model = start(planner)
    last = len(order)
    for modality in order:
        model = model.with_connector(modality, planner.align(model.backbone, modality, last))
    model = planner.fine_tune(model, tuple(sorted(order)), last)
    return [Stage(last, order[-1], final=model)]
