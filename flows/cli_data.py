"""`graftline data check` and `graftline data import`: a recipe's own data before it runs."""

from __future__ import annotations

import typer

from flows.options import RecipePath, Settings, checked, console, out, overrides_of


def check(recipe: RecipePath, settings: Settings = None) -> None:
    """Count a recipe's rows, show some of them as pictures and text, name every bad one."""
    chosen = checked(recipe, overrides_of(None, None, settings))
    from flows import checking

    found = checking.check(chosen, console)
    out.print(checking.count_table(found))
    for line in checking.lines_of(found):
        out.print(line, markup=False, highlight=False, soft_wrap=True, emoji=False)
    checking.raise_problems(chosen, found)


def import_(recipe: RecipePath, settings: Settings = None) -> None:
    """Import the rows of a recipe's own sources; `graftline run` does it by itself."""
    chosen = checked(recipe, overrides_of(None, None, settings))
    from flows import checking

    for name, rows in checking.import_sources(chosen, console).items():
        counts = {split: sum(tasks.values()) for split, tasks in rows.counts.items()}
        listed = ", ".join(f"{count} {split}" for split, count in counts.items())
        out.print(f"{name}: {listed}", markup=False, highlight=False, soft_wrap=True)


def register(data: typer.Typer) -> None:
    """Adds these commands to `graftline data`."""
    data.command()(check)
    data.command("import")(import_)
