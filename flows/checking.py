"""`graftline data check` and `data import`: what the command line's words mean."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from graftline.data.checking import Checked, check_folder, checked
from graftline.data.rows import SPLITS
from graftline.data.sources.importing import Imported, Request
from graftline.durable import StoreUnwritable
from graftline.errors import GraftlineError
from graftline.progress import shown
from graftline.recipe import Recipe
from graftline.steps.imports import OwnRows, hashes_of, requests_of, rows_of
from graftline.stores import open_store
from tasks.data import bar
from tasks.outputs import data_folder
from tasks.own_data import import_own_data, in_folder

_LISTED = 50


def check(recipe: Recipe, console: Console) -> list[Checked]:
    """Looks at every row of a recipe's data; what is right is imported at once.

    Args:
        recipe: the recipe.
        console: for progress bars.

    Returns:
        What was found, by modality; sheets and texts lie in `reports/<recipe>/data/`. A source
        that cannot be read is a problem among the others.

    Raises:
        StoreUnwritable: the disk is full, or the store read-only.
    """
    out, store = data_folder(recipe.name), open_store(recipe.store)
    hashes = hashes_of(store)
    found: dict[str, Checked] = {}
    with shown(console):
        for name, request in requests_of(recipe).items():
            noted: list[Checked] = []
            try:
                with bar() as progress:
                    rows_of(request, store, hashes, progress, _look(request, out, noted))
            except StoreUnwritable:
                raise
            except GraftlineError as error:
                if not noted:
                    said = f"modalities.{name}.data: {error}"
                    noted.append(checked(name, request.kind, out / name, {}, [], [said], out))
            found[name] = noted[0]
        folder = in_folder(recipe)
        for each in check_folder(Path(recipe.data.folder), folder, out) if folder else ():
            found[each.modality] = each
    return [found[name] for name in recipe.order]


def _look(request: Request, out: Path, noted: list[Checked]) -> Callable[[Path, Imported], None]:
    def look(folder: Path, imported: Imported) -> None:
        noted.append(
            checked(
                request.modality,
                request.kind,
                folder,
                imported.counts,
                imported.warnings,
                imported.problems,
                out,
            )
        )

    return look


def import_sources(recipe: Recipe, console: Console) -> dict[str, OwnRows]:
    """Imports the rows of a recipe's own sources, as `graftline run` does by itself.

    Raises:
        GraftlineError: the recipe has none, or lists every problem by file and row.
    """
    if not requests_of(recipe):
        raise GraftlineError(
            f"{recipe.name}: no modality has a source of its own (modalities.<name>.data); rows in "
            f"{recipe.data.folder} are used as they are"
        )
    with shown(console):
        return import_own_data.fn(recipe)


def count_table(found: list[Checked]) -> Table:
    """Rows by modality, split and task."""
    table = Table("modality", "media", "task", *SPLITS)
    for each in found:
        tasks = dict.fromkeys(task for split in SPLITS for task in each.counts.get(split, {}))
        for task in tasks or ("none",):
            counts = [str(each.counts.get(split, {}).get(task, 0)) for split in SPLITS]
            table.add_row(each.modality, each.kind, task, *counts)
    return table


def lines_of(found: list[Checked]) -> list[str]:
    """Some rows, warnings and where the pictures lie."""
    lines = []
    for each in found:
        lines += ["", f"{each.modality}:", *(f"  {row}" for row in each.rows)]
        lines += [f"  warning: {warning}" for warning in each.warnings[:_LISTED]]
        if each.sheet is not None:
            lines.append(f"  {each.sheet}")
    return lines


def raise_problems(recipe: Recipe, found: list[Checked]) -> None:
    """Raises a GraftlineError that lists what is wrong, if anything is."""
    problems = [problem for each in found for problem in each.problems]
    if not problems:
        return
    listed = problems[:_LISTED]
    if len(problems) > _LISTED:
        listed.append(f"... and {len(problems) - _LISTED} more; all: {data_folder(recipe.name)}")
    skip = ", or go on without bad rows by `modalities.<name>.data.bad_rows: skip`"
    raise GraftlineError(
        f"the data of {recipe.name} have {len(problems)} problem(s); mend them"
        + (skip if requests_of(recipe) else "")
        + ":\n  "
        + "\n  ".join(listed)
    )
