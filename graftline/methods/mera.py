"""MERA, "Merge then Realign" (Zhang et al., EMNLP 2025, arXiv 2503.07663), and its two halves."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from graftline.methods import Stage, add_modality, start
from graftline.plan import Model, Planner


@dataclass(frozen=True)
class Halves:
    """Which of MERA's third and fourth step a method takes."""

    merges: bool = True
    realigns: bool = True


HALVES: Mapping[str, Halves] = MappingProxyType(
    {
        "mera": Halves(),
        "merge-only": Halves(realigns=False),
        "realign-only": Halves(merges=False),
    }
)


def mera(planner: Planner, order: Sequence[str]) -> list[Stage]:
    """Align, fine-tune, merge, realign every connector."""
    return _grow(planner, order, HALVES["mera"])


def merge_only(planner: Planner, order: Sequence[str]) -> list[Stage]:
    """MERA without its fourth step: an ablation."""
    return _grow(planner, order, HALVES["merge-only"])


def realign_only(planner: Planner, order: Sequence[str]) -> list[Stage]:
    """MERA without its third step: an ablation."""
    return _grow(planner, order, HALVES["realign-only"])


def _grow(planner: Planner, order: Sequence[str], halves: Halves) -> list[Stage]:
    model, stages = start(planner), list[Stage]()
    for index, modality in enumerate(order, start=1):
        stages.append(add_stage(planner, model, modality, index, halves, order))
        model = stages[-1].final
    return stages


def add_stage(
    planner: Planner,
    model: Model,
    modality: str,
    index: int,
    halves: Halves,
    replayed: Collection[str],
) -> Stage:
    """One stage: what makes theta_i and its connectors of theta_{i-1} and a new modality.

    Args:
        planner: makes the steps.
        model: theta_{i-1} with its connectors.
        modality: what is new.
        index: i, from 1.
        halves: what is done about forgetting.
        replayed: modalities whose replay is there; connectors of others stay as they are.
    """
    vanilla = add_modality(planner, model, modality, index)
    final, merged = vanilla, None
    if index > 1:
        if halves.merges:
            backbone = planner.merge(model.backbone, vanilla.backbone, index)
            final = merged = Model(backbone, vanilla.connectors)
        if halves.realigns:
            final = _realign(planner, final, index, replayed)
    return Stage(index, modality, final, vanilla, merged)


def _realign(planner: Planner, model: Model, stage: int, replayed: Collection[str]) -> Model:
    """Connectors on their own replay; independent of each other, so in any order."""
    connectors = {
        name: planner.realign(model, name, stage) if name in replayed else connector
        for name, connector in model.connectors.items()
    }
    return Model(model.backbone, connectors)
