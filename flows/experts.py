"""The experts alone: one model a modality, what every other method's retention is measured by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefect import flow

from flows.continual import continual


@flow(name="experts", persist_result=False, validate_parameters=False)
def experts(recipe_path: str, overrides: Mapping[str, Any] | None = None) -> str:
    """Trains and measures the expert of each modality of a recipe.

    Args:
        recipe_path: `params/*.yaml`.
        overrides: dotted key -> value; wins over the file.

    Returns:
        The report's folder.
    """
    return continual(recipe_path, {**(overrides or {}), "method": "experts"})
