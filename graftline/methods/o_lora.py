"""O-LoRA (Wang et al., arXiv 2310.14152): a LoRA a stage, in directions of its own."""

from __future__ import annotations

from collections.abc import Sequence

from graftline.methods import Stage
from graftline.methods.chain import chain
from graftline.planning.guarding import Guard, GuardPlanner
from graftline.planning.plan import Model, Planner
from graftline.recipe import LoraSettings


def o_lora(planner: Planner, order: Sequence[str]) -> list[Stage]:
    """Each stage's LoRA is kept orthogonal to the earlier ones', then folded into the backbone.

    On every linear layer [ours]; the paper's are on queries and values.
    """
    return chain(planner, order, _learn)


def _learn(planner: GuardPlanner, aligned: Model, modality: str, stages: Sequence[Stage]) -> Model:
    settings = planner.recipe.rivals.o_lora
    guard = Guard(
        "o-lora",
        {"strength": settings.strength},
        parents={f"subspace.{stage.modality}": stage.final.backbone for stage in stages},
        mode="lora",
        lora=LoraSettings(rank=settings.rank, alpha=settings.alpha),
    )
    return planner.guarded_fine_tune(aligned, modality, len(stages) + 1, guard)
