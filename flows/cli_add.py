"""`graftline add`: one more modality for an exported model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.options import (
    Method,
    RecipePath,
    Seed,
    Settings,
    Verbose,
    checked,
    console,
    out,
    overrides_of,
)
from tasks.environment import prepare


def add(
    recipe: RecipePath,
    model: Annotated[
        Path, typer.Argument(help="The exported model: what `graftline export` made.")
    ],
    folder: Annotated[Path, typer.Option("--out", help="Folder to make, for the new model.")],
    method: Method = None,
    seed: Seed = None,
    settings: Settings = None,
    verbose: Verbose = False,
) -> None:
    """Add one modality to an exported model by one stage of MERA, and export the new model."""
    prepare(verbose=verbose)
    overrides = overrides_of(method, seed, settings)
    chosen = checked(recipe, overrides)
    from flows.running import run_addition
    from graftline.asking.bundle import refuse_existing
    from graftline.exchange.adding import check_recipe

    refuse_existing(folder)  # both before a server starts
    check_recipe(chosen, model)

    report = Path(run_addition(str(recipe), str(model), str(folder), overrides, console))
    from flows.showing import print_report
    from tasks.outputs import ADDITION

    print_report(out, report)
    for line in added_lines(json.loads((report / ADDITION).read_text(encoding="utf-8"))):
        out.print(line, markup=False, highlight=False, soft_wrap=True)
    out.print(
        f'{folder}: the new model. Ask it: graftline ask {folder} "..."',
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def added_lines(found: dict[str, Any]) -> list[str]:
    """What was kept of the exported model, and what could not be done, a line each."""
    kept, title = found["kept"], f"BRG over stage {found['stage']}, against recorded scores"
    lines = [f"{title}: {'n/a, ' + found['undefined'] if kept is None else f'{kept:.2f} %'}"]
    for name, before in found["before"].items():
        after = found["after"][name]
        lines.append(f"  {name}: {100 * before:.1f} recorded, {100 * after:.1f} now")
    lines += [f"not realigned: {m} ({why})" for m, why in found["not_realigned"].items()]
    lines += [f"not compared: {m} ({why})" for m, why in found["not_compared"].items()]
    return lines
