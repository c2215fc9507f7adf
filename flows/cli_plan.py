"""`graftline plan`: what a run will do and cost, known before anything starts."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from flows.options import Method, RecipePath, Seed, Settings, checked, out, overrides_of


def plan(
    recipe: RecipePath,
    method: Method = None,
    seed: Seed = None,
    settings: Settings = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for machines.")] = False,
) -> None:
    """Print a recipe's problems, its steps and what they will cost; nothing is computed."""
    chosen = checked(recipe, overrides_of(method, seed, settings))
    from flows import planning
    from graftline.planning.problems import problems_error
    from tasks.outputs import usual_order

    prospect = planning.look_ahead(chosen, usual_order(recipe))
    if as_json:
        out.print_json(json.dumps(planning.as_json(prospect)), indent=2)
    else:
        for line in planning.step_lines(prospect):
            out.print(line, markup=False, highlight=False, soft_wrap=True)
        if prospect.costs is not None:
            out.print(planning.cost_table(prospect))
    if prospect.problems:
        raise problems_error(recipe, prospect.problems)
