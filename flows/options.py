"""What several commands of the command line share: options, consoles, reading a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from graftline.errors import GraftlineError

if TYPE_CHECKING:
    from graftline.recipe import Recipe

console = Console(stderr=True)
out = Console()

RecipePath = Annotated[Path, typer.Argument(help="The recipe, e.g. params/starter.yaml.")]
Method = Annotated[
    str | None,
    typer.Option(
        help="mera, merge-only, realign-only, finetune, connector-only, joint, experts; beyond "
        "MERA: mera+, mera-corrected, mera-distilled, mera-masks; against "
        "forgetting: replay, ewc, lwf, der, attention-only, o-lora, pathweave; or a rule that "
        "combines the experts: average, task-arithmetic, ties, dare-ties, consensus, pcb, emr, "
        "mmer, route."
    ),
]
Seed = Annotated[int | None, typer.Option(help="Seed of all random choices.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. replay.fraction=0.01."),
]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show Prefect's own log lines.")]


def overrides_of(
    method: str | None, seed: int | None, settings: list[str] | None
) -> dict[str, Any]:
    """Dotted key -> value, of what a command line says."""
    from graftline.settings.reading import parse_override

    overrides = dict(parse_override(text) for text in settings or [])
    if method is not None:
        overrides["method"] = method
    if seed is not None:
        overrides["seed"] = seed
    return overrides


def no_data(recipe: Recipe, path: Path) -> GraftlineError:
    """Why nothing can be planned, and what to do."""
    from tasks.data import why_not_built
    from tasks.own_data import in_folder, known_data

    known, _ = known_data(recipe)
    missing = [name for name in recipe.order if known is None or name not in known.files]
    if own := [name for name in missing if name not in in_folder(recipe)]:
        return GraftlineError(
            f"{path}: rows of {', '.join(own)} are still to be imported, so nothing can be "
            f"planned; run: graftline data import {path}"
        )
    if known is not None:
        return GraftlineError(
            f"{recipe.data.folder} holds no rows of {', '.join(missing)}, so nothing can be "
            f"planned; put them there as <name>/<split>.parquet, or take {', '.join(missing)} out "
            "of order"
        )
    return GraftlineError(
        why_not_built(recipe.data.folder, in_folder(recipe))
        or f"{recipe.data.folder} holds no data yet, so nothing can be planned; run: "
        "graftline data build"
    )


def checked(path: Path, overrides: dict[str, Any]) -> Recipe:
    """The recipe, or an error that lists its problems; imports what it needs only now."""
    from graftline.settings.reading import load_recipe

    return load_recipe(path, overrides)
