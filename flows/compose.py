"""Composition: experts trained apart, in parallel where slots allow, then combined by a rule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefect import flow

from flows.continual import continual


@flow(name="compose", persist_result=False, validate_parameters=False)
def compose(recipe_path: str, rule: str, overrides: Mapping[str, Any] | None = None) -> str:
    """Trains what experts are missing and combines them.

    Args:
        recipe_path: `params/*.yaml`.
        rule: average, task-arithmetic, ties, dare-ties, consensus, pcb, emr, mmer or route.
        overrides: dotted key -> value; wins over the file.

    Returns:
        The report's folder.
    """
    return continual(recipe_path, {**(overrides or {}), "method": rule})
