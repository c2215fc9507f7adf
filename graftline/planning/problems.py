"""What is wrong with a recipe beyond its form, all of it at once, before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch

from graftline.data.rows import MODALITIES, SPLITS
from graftline.encoders import encoder_problem
from graftline.errors import GraftlineError
from graftline.merging.rules import RULES, parameters_for, rule_named
from graftline.methods.mera import HALVES
from graftline.model.own_backbone import backbone_problem
from graftline.recipe import BeyondName, Recipe

_MERGING = ("mera", "merge-only", *get_args(BeyondName))
_REALIGNING = tuple(method for method, (_, realigns) in HALVES.items() if realigns)
NOT_BUILT = "not built yet"
_INNER = ("mera+", "mera-corrected", "mera-distilled")


def recipe_problems(
    recipe: Recipe, data_files: Mapping[str, Mapping[str, str]], *, own_start: bool = True
) -> list[str]:
    """Everything that would stop a run, as far as it can be known without computing.

    Args:
        recipe: a recipe whose form is right.
        data_files: modality -> split -> md5 of its parquet file.
        own_start: it starts from the recipe's own backbone, and not from an exported model.

    Returns:
        A line a problem: where it is and what to do; empty when there is none.
    """
    backbone = backbone_problem(recipe.backbone.source) if own_start else None
    problems = [f"backbone.source: {backbone}"] if backbone else []
    connectors = torch.nn.ModuleDict()
    for modality in recipe.order:
        if hasattr(connectors, modality):
            problems.append(f"modalities.{modality}: torch calls a part of models so; rename it")
        found = encoder_problem(recipe.modality(modality).encoder, recipe.kind_of(modality))
        problems += [f"modalities.{modality}.encoder: {found}"] if found else []
        missing = [split for split in SPLITS if split not in data_files.get(modality, {})]
        if missing and recipe.modality(modality).data is None:
            files = ", ".join(f"{recipe.data.folder}/{modality}/{each}.parquet" for each in missing)
            rebuild = f"`graftline data build --folder {recipe.data.folder} --force`"
            advice = f" rebuild the starter's with {rebuild}," if modality in MODALITIES else ""
            problems.append(
                f"order: {modality} has no data: {files} missing; put the rows there,{advice} or "
                f"take {modality} out of order"
            )
    problems += [*_connector_problems(recipe), *_rule_problems(recipe)]
    return problems + (_run_device_problems(recipe) if recipe.execution.where == "here" else [])


def require_possible(
    recipe: Recipe, data_files: Mapping[str, Mapping[str, str]], *, own_start: bool = True
) -> None:
    """Raises a GraftlineError that lists what `recipe_problems` finds, before anything is computed.

    Args:
        recipe: as for `recipe_problems`.
        data_files: so, too.
        own_start: so, too.
    """
    if problems := recipe_problems(recipe, data_files, own_start=own_start):
        raise problems_error(recipe.name, problems)


def files_to_come(recipe: Recipe) -> dict[str, dict[str, str]]:
    """Stands for the data's files before they are built: modality -> split -> `NOT_BUILT`."""
    return {modality: dict.fromkeys(SPLITS, NOT_BUILT) for modality in recipe.order}


def problems_error(called: object, problems: Sequence[str]) -> GraftlineError:
    """The error that lists all problems of a recipe."""
    listed = "\n".join(f"  - {line}" for line in problems)
    return GraftlineError(f"{called}: {len(problems)} problem(s) stand in the way:\n{listed}")


def device_problems(name: str, where: str = "execution.device") -> list[str]:
    """Why nothing can be computed on a device of this machine; empty if it can.

    Args:
        name: as in a recipe.
        where: the key or the option that names it.
    """
    if name == "auto":
        return []
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        reason = str(error).splitlines()[0]
        return [f"{where}: {name} cannot be used here ({reason}); auto takes what is here"]
    return []


def _run_device_problems(recipe: Recipe) -> list[str]:
    name = recipe.execution.device
    if name.partition(":")[0] == "mps":
        return [
            f"execution.device: {name} has no float64, in which connectors are fitted; take cpu"
        ]
    return device_problems(name)


def require_device(name: str, where: str = "execution.device") -> None:
    """Raises a GraftlineError that says what `device_problems` finds.

    Args:
        name: as for `device_problems`.
        where: so, too.
    """
    if problems := device_problems(name, where):
        raise GraftlineError("\n".join(problems))


def _connector_problems(recipe: Recipe) -> list[str]:
    """Resamplers where a method works on what the last layer of a connector reads as a vector."""
    corrects = recipe.method in _REALIGNING and recipe.realign.start == "corrected"
    if recipe.method not in _INNER and not corrects:
        return []
    cause = "realign.start: corrected" if corrects else f"method {recipe.method}"
    return [
        f"modalities.{name}.connector.kind: resampler: {cause} works on connectors with one last "
        "layer over all tokens; take mlp or linear, or another method"
        for name in recipe.order
        if recipe.modality(name).connector.kind == "resampler"
    ]


def _rule_problems(recipe: Recipe) -> list[str]:
    """Parameters that the rule in use does not take."""
    if recipe.method in RULES:
        given = {str(name): values for name, values in recipe.compose.parameters.items()}
        where = f"compose.parameters.{recipe.method}"
        return _rule(where, recipe.method, given.get(recipe.method, {}), len(recipe.order))
    if recipe.method in _MERGING and recipe.merge.rule in RULES:
        return _rule("merge.parameters", recipe.merge.rule, recipe.merge.parameters, 2)
    return []


def _rule(where: str, name: str, values: Mapping[str, Any], experts: int) -> list[str]:
    """What a rule says against its parameters, behind the recipe's key."""
    try:
        parameters_for(rule_named(name), values, experts)
    except GraftlineError as error:
        return [f"{where}: {error}"]
    return []
