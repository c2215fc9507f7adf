"""One more modality for an exported model, planned from the model's own folder and new rows.

The stage is MERA's, made of the same steps as in a run from nothing: the exported backbone stands
for theta_{i-1}, and i is one more than the stage that the model's records name. What cannot be done
with the rows at hand is not done, and said.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from graftline.asking.bundle import (
    Description,
    content_digest,
    measured_cells,
    read_description,
)
from graftline.encoders import describe_encoder
from graftline.evaluation.cells import ScoreCell
from graftline.evaluation.gains import Gain, retention
from graftline.methods import Stage
from graftline.methods.mera import HALVES, add_stage, halves_of
from graftline.planning.plan import Model, Planner, Reference, bundle_step
from graftline.planning.realigning import RealignPlanner
from graftline.planning.run import RunPlan, last_scores, stage_scores
from graftline.recipe import ModalitySettings, Recipe
from graftline.settings.reading import RecipeError
from graftline.store import Store

Files = Mapping[str, Mapping[str, str]]
"""Modality -> split -> md5 of its parquet file."""


@dataclass(frozen=True)
class Addition:
    """What adding a modality to an exported model takes, and what it cannot do.

    Attributes:
        plan: the stage as the last one of a run whose earlier stages are recorded. Its order holds
            the modalities that are compared.
        origin: the model that it starts from.
        digest: of that model's folder.
        modality: what is new.
        stage: i.
        not_realigned: old modality -> why its connector stays as it is.
        not_compared: old modality -> why its score cannot be set against the recorded one.
        before: old modality -> its recorded score with the model that this starts from.
        recorded: what that model's folder records of the compared modalities.
    """

    plan: RunPlan
    origin: Description
    digest: str
    modality: str
    stage: int
    not_realigned: Mapping[str, str]
    not_compared: Mapping[str, str]
    before: Mapping[str, float]
    recorded: tuple[ScoreCell, ...]

    @property
    def order(self) -> tuple[str, ...]:
        """Everything that the new model knows, in the order in which it was learned."""
        return (*_learned(self.origin), self.modality)

    def kept(self, after: Mapping[str, float]) -> Gain:
        """What old modalities score now against what the exported model scored, in per cent.

        `100 / n * sum_j S[i][m_j] / S[i-1][m_j]`: BRG over this one stage, with the recorded
        scores below the line.

        Args:
            after: modality -> score with the new model.
        """
        old = [name for name in self.before if name in after]
        if not old:
            return Gain(None, "no old modality is compared")
        last = {len(old): {name: after[name] for name in old}}
        return retention(last, self.before, old)

    def measured(self, cells: Sequence[ScoreCell]) -> tuple[ScoreCell, ...]:
        """All that is known of the new model's stages, as its folder records it.

        Args:
            cells: of the report, in which this stage is the last of the compared ones.
        """
        last = len(self.plan.recipe.order)
        new = (c for c in cells if c.stage == last and c.modality in (*self.before, self.modality))
        return (*self.recorded, *(replace(cell, stage=self.stage) for cell in new))

    def tested(self, files: Files) -> dict[str, dict[str, str]]:
        """Which rows the new model's recorded scores are of, by modality."""
        recipe = self.plan.recipe
        return {n: tested_rows(recipe, files, n) for n in (*self.before, self.modality)}


def take_in(folder: Path, store: Store) -> Reference:
    """Copies an exported model's weights into the store, where steps find their parents.

    Raises:
        GraftlineError: the folder is damaged, or the store cannot be written.
    """
    step = bundle_step(content_digest(folder))

    def build(out: Path) -> None:
        shutil.copytree(folder / "backbone", out / "backbone")
        for file in sorted((folder / "connectors").iterdir()):
            shutil.copyfile(file, out / file.name)

    step.publish(store, build)
    return step.reference


def check_recipe(recipe: Recipe, folder: Path) -> Description:
    """What an exported model is, if a recipe can add a modality to it.

    Raises:
        RecipeError: lists everything that stands against it.
        GraftlineError: the folder is no exported model, or is damaged.
    """
    origin = read_description(folder)
    new = [name for name in recipe.order if name not in origin.encoders]
    problems = []
    if origin.masked or origin.experts or origin.adapters:
        problems.append("its media meet weights of their own; only a model of one backbone grows")
    if recipe.method not in HALVES:
        problems.append(f"{recipe.method} adds no stage to a model; use {', '.join(HALVES)}")
    if recipe.merge.rule != "running-average":
        problems.append(f"merge.rule {recipe.merge.rule} needs theta_0; use running-average")
    if len(new) != 1:
        what = f"names {', '.join(new)}" if new else "names nothing that it does not know"
        problems.append(f"order {what}: add one modality at a time, with --set order=[...]")
    for key, ours, its in (
        ("precision", recipe.precision, origin.precision),
        ("backbone.system_prompt", recipe.backbone.system_prompt, origin.system_prompt),
    ):
        if ours != its:
            problems.append(f"{key} is {ours!r}, the model has {its!r}; use the model's")
    for name in recipe.order:
        known = origin.encoders.get(name)
        if known is None:
            continue
        here = describe_encoder(recipe.modality(name).encoder, recipe.kind_of(name))
        same_name = known.own is not None or here["name"] == known.name  # of own ones: a path
        if not same_name or here["sha256"] != known.sha256:
            problems.append(f"modalities.{name}.encoder: the model's is {known.name}")
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise RecipeError(f"{recipe.name} cannot add a modality to {folder}:\n{listed}")
    return origin


def plan_addition(recipe: Recipe, files: Files, folder: Path) -> Addition:
    """Plans one stage on top of an exported model; computes nothing.

    Args:
        recipe: its `order` names the new modality, and the old ones whose rows are at hand.
        files: the data's.
        folder: the exported model.

    Raises:
        RecipeError: lists everything that stands against it.
    """
    origin = check_recipe(recipe, folder)
    [new] = [name for name in recipe.order if name not in origin.encoders]
    if new not in files:
        raise RecipeError(f"{recipe.data.folder}: holds no rows of {new}, which is to be added")
    old = _learned(origin)
    apart = {name: reason for name in old if (reason := _rows_lack(name, recipe, files))}
    recorded = measured_cells(folder)
    not_compared = {
        name: reason
        for name in old
        if (reason := apart.get(name) or _not_comparable(name, recipe, files, origin, recorded))
    }
    compared = [name for name in old if name not in not_compared]
    measured = [*(compared or [name for name in old if name not in apart]), new]
    digest, stage = content_digest(folder), origin.stage + 1
    planner = Planner(_widened(recipe, origin, measured), files)
    taken = planner.bundle(digest)
    start = Model(taken, dict.fromkeys(old, taken))
    replayed = [name for name in (*old, new) if name not in apart]
    halves = halves_of(recipe.method, RealignPlanner.beside(planner), replayed)
    made = add_stage(planner, start, new, stage, *halves, ())
    known = tuple(cell for cell in recorded if cell.modality in compared)
    plan = _plan(planner, made, taken, measured, _chain(known, origin, compared))
    _, realigns = halves
    not_realigned = apart if realigns else dict.fromkeys(old, f"{recipe.method} realigns nothing")
    before = _scores(recorded, origin.stage, compared)
    return Addition(plan, origin, digest, new, stage, not_realigned, not_compared, before, known)


def tested_rows(recipe: Recipe, files: Files, modality: str) -> dict[str, str]:
    """What tells which rows a modality's scores are of."""
    split = recipe.evaluation.split
    limit = (recipe.data.rows or {}).get(split)
    rows = "all" if limit is None else f"first {limit}"
    return {"split": split, "md5": files[modality][split], "rows": rows}


def _learned(origin: Description) -> tuple[str, ...]:
    return tuple(name for name in origin.order if name in origin.encoders)


def _rows_lack(name: str, recipe: Recipe, files: Files) -> str | None:
    if name not in recipe.order:
        return "the recipe's order does not name it"
    return None if name in files else f"{recipe.data.folder} holds no rows of it"


def _not_comparable(
    name: str, recipe: Recipe, files: Files, origin: Description, cells: Sequence[ScoreCell]
) -> str | None:
    """Why a modality's score cannot be set against what the exported model's run measured."""
    learned = origin.order.index(name) + 1
    places = {(cell.point, cell.stage) for cell in cells if cell.modality == name}
    if not {("final", learned), ("final", origin.stage), ("vanilla", learned)} <= places:
        return "the exported model records no score of it for every stage"
    if origin.tested.get(name) != tested_rows(recipe, files, name):
        return "its recorded score is of other rows"
    return None


def _widened(recipe: Recipe, origin: Description, order: Sequence[str]) -> Recipe:
    """The recipe with this order, which describes every modality that the new model will have."""
    known = {
        name: ModalitySettings.model_validate(
            {
                "encoder": each.own["settings"] if each.own else each.name,
                "media": origin.kinds.get(name),
            }
        )
        for name, each in origin.encoders.items()
    }
    known |= {str(name): settings for name, settings in recipe.modalities.items()}
    return recipe.model_copy(update={"order": tuple(order), "modalities": known})


def _plan(
    planner: Planner,
    made: Stage,
    taken: Reference,
    measured: Sequence[str],
    recorded: tuple[ScoreCell, ...],
) -> RunPlan:
    """The stage as a run's last one."""
    number = len(measured)
    stage = replace(made, index=number)
    asked = replace(
        stage,
        final=_only(stage.final, measured),
        merged=_only(stage.merged, measured) if stage.merged else None,
    )
    scores = [*stage_scores(planner, asked), *last_scores(planner, (asked,))]
    perplexity = {
        "before": planner.perplexity(taken, 0),
        "after": planner.perplexity(stage.final.backbone, number),
    }
    steps = {
        reference: replace(step, stage=number if step.stage else 0)
        for reference, step in planner.steps.items()
    }
    return RunPlan(planner.recipe, (stage,), tuple(scores), perplexity, steps, recorded)


def _only(model: Model, names: Sequence[str]) -> Model:
    return replace(model, connectors={name: model.connectors[name] for name in names})


def _chain(
    cells: Sequence[ScoreCell], origin: Description, compared: Sequence[str]
) -> tuple[ScoreCell, ...]:
    """Recorded scores of the compared modalities' stages, as stages of a run of these alone."""
    numbers = {
        origin.order.index(name) + 1: number for number, name in enumerate(compared, start=1)
    }
    return tuple(
        replace(cell, stage=numbers[cell.stage])
        for cell in cells
        if cell.stage in numbers and cell.point in ("final", "vanilla")
    )


def _scores(cells: Sequence[ScoreCell], stage: int, names: Sequence[str]) -> dict[str, float]:
    """Modality -> recorded final score at a stage: the mean over its tasks."""
    found: dict[str, list[float]] = {name: [] for name in names}
    for cell in cells:
        if (cell.point, cell.stage) == ("final", stage) and cell.modality in found:
            found[cell.modality].append(cell.score)
    return {name: math.fsum(scores) / len(scores) for name, scores in found.items()}
