"""The whole plan of a run: the method's stages, the experts, and every score that is needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Literal

from graftline.evaluation.cells import JOINT, ScoreCell
from graftline.evaluation.scoring import JOINT_TASKS
from graftline.methods import Stage, method_named
from graftline.methods.experts import expert
from graftline.planning.plan import Model, Planner, Reference, Step
from graftline.recipe import Recipe


@dataclass(frozen=True)
class PlannedScore:
    """One modality's scores with one model, and the artifact that will hold them."""

    stage: int
    stage_modality: str
    modality: str
    point: Literal["vanilla", "merged", "final", "expert"]
    reference: Reference


@dataclass(frozen=True)
class RunPlan:
    """What a run computes.

    Attributes:
        recipe: the recipe.
        stages: the method's stages.
        scores: what is measured.
        perplexity: text perplexity of theta_0 (`before`) and of the last backbone (`after`).
        steps: all steps, parents before children.
        recorded: scores of earlier stages, which another run measured.
    """

    recipe: Recipe
    stages: tuple[Stage, ...]
    scores: tuple[PlannedScore, ...]
    perplexity: Mapping[str, Reference]
    steps: Mapping[Reference, Step]
    recorded: tuple[ScoreCell, ...] = ()

    @property
    def fingerprint(self) -> str:
        """Identity of the run's result."""
        names = sorted(score.reference.fingerprint for score in self.scores)
        return sha256("\n".join(names).encode()).hexdigest()


def plan_run(recipe: Recipe, data_files: Mapping[str, Mapping[str, str]]) -> RunPlan:
    """Plans a recipe's run; computes nothing.

    Args:
        recipe: the recipe.
        data_files: modality -> split -> md5 of its parquet file.
    """
    planner = Planner(recipe, data_files)
    base = planner.backbone()
    perplexity = {"before": planner.perplexity(base, 0)}
    stages = tuple(method_named(recipe.method)(planner, recipe.order))
    scores = [score for stage in stages for score in stage_scores(planner, stage)]
    scores += last_scores(planner, stages)
    for modality in recipe.order if recipe.evaluation.references else ():
        alone = expert(planner.common(), modality)
        scores.append(_score(planner, alone, modality, "expert", 0, modality))
    last = stages[-1].final.backbone if stages else base
    perplexity["after"] = planner.perplexity(last, len(recipe.order))
    return RunPlan(recipe, stages, tuple(scores), perplexity, dict(planner.steps))


def last_scores(planner: Planner, stages: tuple[Stage, ...]) -> list[PlannedScore]:
    """What is asked at the last stage alone: the merged model, and joint questions."""
    if not stages:
        return []
    last = stages[-1]
    scores = []
    if last.merged is not None and last.merged != last.final:
        scores = [
            _stage_score(planner, last, last.merged, m, "merged") for m in last.final.connectors
        ]
    joint = planner.recipe.evaluation.joint
    if joint and len(last.final.connectors) >= min(JOINT_TASKS):
        reference = planner.evaluate_joint(last.final, last.index)
        scores.append(PlannedScore(last.index, last.modality, JOINT, "final", reference))
    return scores


def stage_scores(planner: Planner, stage: Stage) -> list[PlannedScore]:
    """What is asked at every stage: vanilla on what is new, the final model on all it knows."""
    scores = []
    if stage.vanilla is not None:
        scores.append(_stage_score(planner, stage, stage.vanilla, stage.modality, "vanilla"))
    for modality in stage.final.connectors:
        scores.append(_stage_score(planner, stage, stage.final, modality, "final"))
    return scores


def _stage_score(
    planner: Planner,
    stage: Stage,
    model: Model,
    modality: str,
    point: Literal["vanilla", "merged", "final"],
) -> PlannedScore:
    return _score(planner, model, modality, point, stage.index, stage.modality)


def _score(
    planner: Planner,
    model: Model,
    modality: str,
    point: Literal["vanilla", "merged", "final", "expert"],
    stage: int,
    stage_modality: str,
) -> PlannedScore:
    reference = planner.evaluate(model, modality, stage, point)
    return PlannedScore(stage, stage_modality, modality, point, reference)
