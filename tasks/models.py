"""What a user calls a model, found: an exported folder, a report, a registered name, a recipe."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from graftline.asking.bundle import (
    BACKBONE_PARTS,
    Description,
    describe_encoders,
    describe_part,
    is_bundle,
    read_bundle,
)
from graftline.asking.card import model_card
from graftline.asking.parts import Parts, parts_of_plan, stage_of
from graftline.errors import GraftlineError
from graftline.evaluation.earlier import ended_at
from graftline.evaluation.report import EXAMPLES, RunScores, metrics_of, read_report
from graftline.exchange.adding import tested_rows
from graftline.model.own_backbone import backbone_name
from graftline.planning.run import RunPlan, plan_run
from graftline.settings.reading import RecipeError, load_recipe
from graftline.stores import open_store
from tasks.outputs import EXPORTED, alias_of, read_object, report_folder, usual_order
from tasks.own_data import in_folder, known_data
from tasks.references import DataVersion

RECIPES = Path("params")
_REGISTERED = re.compile(r"(?:models:/)?(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))")


@dataclass(frozen=True)
class FinishedModel:
    """A model of a run in this project's store.

    Attributes:
        plan: the run.
        data: the data's version.
        parts: where its parts lie.
        stage: whose model it is.
        usual: the order that its recipe's file names.
    """

    plan: RunPlan
    data: DataVersion
    parts: Parts
    stage: int
    usual: tuple[str, ...]


def find_parts(model: str, overrides: Mapping[str, Any], stage: int | None = None) -> Parts:
    """Finds a model that can be asked.

    Args:
        model: an exported folder, a report's folder, a recipe, or a registered model's
            `name@alias` or `name/version`.
        overrides: dotted key -> value, for what is found through a recipe.
        stage: which stage's model; the last one's if left out.

    Raises:
        GraftlineError: there is no such model, or a part of it is missing or damaged.
    """
    folder = _exported(model) or Path(model)
    if folder.is_dir() and is_bundle(folder):
        if overrides or stage is not None:
            raise GraftlineError(
                f"{model} is an exported model; --method, --seed, --set and --stage choose among "
                "a recipe's models. Leave them out."
            )
        return read_bundle(folder)
    return find_finished(model, overrides, stage).parts


def _exported(model: str) -> Path | None:
    """Where a registered model lies that grew out of an exported one; None for all others.

    Raises:
        GraftlineError: there is no such registered model.
    """
    registered = _REGISTERED.fullmatch(model)
    if registered is None or Path(model).exists():
        return None
    tags = _tags(registered.groupdict())
    return Path(tags[EXPORTED]) if EXPORTED in tags else None


def find_finished(model: str, overrides: Mapping[str, Any], stage: int | None) -> FinishedModel:
    """Finds a model in the store, by recipe, report or registered name; see `find_parts`.

    Raises:
        GraftlineError: there is no such model, or a part of it is missing or damaged.
    """
    path = Path(model)
    if path.is_dir():
        return _from_report(path, overrides, stage)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return _from_recipe(path, overrides, stage)
    registered = _REGISTERED.fullmatch(model)
    if registered is not None:
        return _from_registry(model, registered.groupdict(), overrides, stage)
    raise GraftlineError(
        f"{model}: no such model. Give an exported folder, a report's folder "
        "(reports/<recipe>/<method>/seed-<s>), a recipe (params/<recipe>.yaml, with --method and "
        "--seed), or a registered model (<recipe>@<method>, <recipe>/<version>)."
    )


def _from_recipe(path: Path, overrides: Mapping[str, Any], stage: int | None) -> FinishedModel:
    recipe = load_recipe(path, overrides)
    data, problems = known_data(recipe)
    if problems:
        raise GraftlineError("\n".join(problems))
    if data is None and in_folder(recipe):
        raise GraftlineError(
            f"{recipe.data.folder}: the data's version names the model, and neither the folder "
            f"nor its .dvc file is here. Run the recipe, or ask an exported folder."
        )
    missing = [name for name in recipe.order if data is None or name not in data.files]
    if missing:
        own = [name for name in missing if recipe.modality(name).data is not None]
        if own:
            raise GraftlineError(
                f"{path}: the rows of {', '.join(own)} are others than those that were imported; "
                f"put them back, or run: graftline run {path}. A model that was exported can be "
                "asked whatever becomes of its rows."
            )
        raise GraftlineError(f"{data.source}: holds no rows of {', '.join(missing)}")
    plan = plan_run(recipe, data.files)
    parts = parts_of_plan(plan, open_store(recipe.store), stage)
    return FinishedModel(plan, data, parts, stage_of(plan, stage).index, usual_order(path))


def _from_report(folder: Path, overrides: Mapping[str, Any], stage: int | None) -> FinishedModel:
    path = folder / "metrics.json"
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        found = {key: metrics[key] for key in ("method", "seed", "order")}
        name, fingerprint = metrics["recipe"], metrics["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GraftlineError(
            f"{folder}: is neither an exported model nor a report ({path.name} is missing or "
            "damaged); give one of these, or a recipe"
        ) from error
    return _made_by(str(folder), name, fingerprint, {**found, **overrides}, stage)


def _from_registry(
    model: str, words: Mapping[str, str | None], overrides: Mapping[str, Any], stage: int | None
) -> FinishedModel:
    name, tags = str(words["name"]), _tags(words)
    found = {"method": tags["method"], "seed": int(tags["seed"])}
    return _made_by(model, name, tags["fingerprint"], {**found, **overrides}, stage)


def _tags(words: Mapping[str, str | None]) -> dict[str, str]:
    """The tags of a registered model, by the parts of its name."""
    from tasks.tracking import registered_tags

    alias = words["alias"]
    return registered_tags(str(words["name"]), alias_of(alias) if alias else None, words["version"])


def _made_by(
    model: str, name: str, fingerprint: str, overrides: Mapping[str, Any], stage: int | None
) -> FinishedModel:
    """The model of the run that a report or the registry tells of."""
    path = recipe_named(name)
    finished = _from_recipe(path, overrides, stage)
    if finished.plan.fingerprint != fingerprint:
        raise GraftlineError(
            f"{model}: was made with other settings, data or code than {path} and this project "
            "hold now. Repeat the run's --set options here, or run the recipe again."
        )
    return finished


def recipe_named(name: str) -> Path:
    """The recipe in `params/` that has this name.

    Raises:
        GraftlineError: there is none, or several.
    """
    found = []
    for path in sorted(RECIPES.glob("*.y*ml")):
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            continue  # another recipe's trouble
        if isinstance(content, dict) and content.get("name") == name:
            found.append(path)
    if len(found) == 1:
        return found[0]
    many = f"several recipes are called {name}: {', '.join(map(str, found))}"
    none = f"no recipe in {RECIPES}/ is called {name}"
    raise RecipeError(f"{many if found else none}; give the recipe's file, --method and --seed")


def described(model: FinishedModel, measured: RunScores | None) -> Description:
    """What an export of a model says of it.

    Args:
        model: the model.
        measured: what its run had measured by then.
    """
    recipe, parts = model.plan.recipe, model.parts
    tested = measured.order if measured is not None else ()
    return Description(
        recipe=recipe.name,
        method=recipe.method,
        seed=recipe.seed,
        stage=model.stage,
        order=recipe.order,
        data_md5=model.data.md5,
        run_fingerprint=model.plan.fingerprint,
        backbone=backbone_name(recipe.backbone.source),
        backbone_part=describe_part(BACKBONE_PARTS.get(backbone_name(recipe.backbone.source))),
        encoders=describe_encoders(parts),
        experts=tuple(parts.experts),
        adapters=tuple(parts.adapters),
        masked=parts.base is not None,
        precision=recipe.precision,
        attention=parts.attention,
        system_prompt=parts.system_prompt,
        text=parts.text,
        kinds=dict(parts.kinds),
        max_new_tokens=parts.max_new_tokens,
        tested={name: tested_rows(recipe, model.data.files, name) for name in tested},
    )


def measured_by(model: FinishedModel) -> RunScores | None:
    """What a model's run had measured when its stage ended; None where there is no report of it."""
    folder = report_folder(model.plan.recipe, model.usual)
    metrics = read_object(folder / "metrics.json")
    if metrics.get("fingerprint") != model.plan.fingerprint or not (folder / EXAMPLES).exists():
        return None
    return ended_at(read_report(folder), model.stage)


def card_of(description: Description, measured: RunScores | None) -> str:
    """A model's card, with the scores that its run had measured by then."""
    return model_card(description, metrics_of(measured) if measured is not None else None)
