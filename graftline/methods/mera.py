"""MERA, "Merge then Realign" (Zhang et al., EMNLP 2025, arXiv 2503.07663), and its two halves."""

from __future__ import annotations

from collections.abc import Sequence

from graftline.methods import Stage, add_modality, start
from graftline.plan import Model, Planner


def mera(planner: Planner, order: Sequence[str]) -> list[Stage]:
    """Align, fine-tune, merge, realign every connector."""
    return _grow(planner, order, merges=True, realigns=True)


def merge_only(planner: Planner, order: Sequence[str]) -> list[Stage]:
    """MERA without its fourth step: an ablation."""
    return _grow(planner, order, merges=True, realigns=False)


def realign_only(planner: Planner, order: Sequence[str]) -> list[Stage]:
    """MERA without its third step: an ablation."""
    return _grow(planner, order, merges=False, realigns=True)


def _grow(planner: Planner, order: Sequence[str], *, merges: bool, realigns: bool) -> list[Stage]:
    model, stages = start(planner), []
    for index, modality in enumerate(order, start=1):
        vanilla = add_modality(planner, model, modality, index)
        final, merged = vanilla, None
        if index > 1:
            if merges:
                backbone = planner.merge(model.backbone, vanilla.backbone, index)
                final = merged = Model(backbone, vanilla.connectors)
            if realigns:
                final = _realign(planner, final, index)
        stages.append(Stage(index, modality, final, vanilla, merged))
        model = final
    return stages


def _realign(planner: Planner, model: Model, stage: int) -> Model:
    """Every connector on its own replay; independent of each other, so in any order."""
    connectors = {name: planner.realign(model, name, stage) for name in model.connectors}
    return Model(model.backbone, connectors)
