"""Only connectors are trained: nothing can be forgotten, and the LLM learns nothing."""

from __future__ import annotations

from collections.abc import Sequence

from graftline.methods import Stage, start
from graftline.plan import Planner


def connector_only(planner: Planner, order: Sequence[str]) -> list[Stage]:
    """Align, then go on with the connector for as many steps as others fine-tune."""
    model, stages = start(planner), []
    for index, modality in enumerate(order, start=1):
        connector = planner.align(model.backbone, modality, index)
        aligned = model.with_connector(modality, connector)
        model = planner.fine_tune(aligned, (modality,), index, mode="connector")
        stages.append(Stage(index, modality, final=model))
    return stages
