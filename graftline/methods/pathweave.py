"""A path of adapters for each modality, in the spirit of PathWeave (arXiv 2410.20178).

As there, the LLM is frozen, a modality's adapters are trained on top of the earlier ones' frozen
ones, and a medium takes its modality's path, so nothing old can change. Unlike there, the path is
the plain sum of the LoRAs up to its own: PathWeave adapts a Q-Former, which nothing here has, and
weighs earlier adapters by small gates that it trains beside its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from graftline.methods import Stage
from graftline.methods.chain import chain
from graftline.planning.guarding import Guard, GuardPlanner
from graftline.planning.plan import Model, Planner, Reference
from graftline.recipe import LoraSettings


def pathweave(planner: Planner, order: Sequence[str]) -> list[Stage]:
    """Stage i learns a LoRA beside theta_0 and the sum of the earlier ones; each path is kept.

    A path is stored as one product, of rank i times that of a LoRA. Text goes along with
    the medium before it; a prompt without media meets theta_0.
    """
    rank = planner.recipe.rivals.pathweave.rank
    paths: dict[str, Reference] = {}
    stages = []
    for stage in chain(planner, order, _learn):
        learned = planner.adapters(stage.final.backbone, stage.modality, rank * stage.index)
        paths = {**paths, stage.modality: learned}
        final = Model(planner.backbone(), stage.final.connectors, adapters=paths, text="modality")
        stages.append(replace(stage, final=final))
    return stages


def _learn(planner: GuardPlanner, aligned: Model, modality: str, stages: Sequence[Stage]) -> Model:
    lora = LoraSettings(**planner.recipe.rivals.pathweave.model_dump())
    guard = Guard("pathweave", mode="lora", lora=lora)
    return planner.guarded_fine_tune(aligned, modality, len(stages) + 1, guard)
