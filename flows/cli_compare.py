"""`graftline compare`: every method side by side, over orders and seeds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.options import (
    RecipePath,
    Settings,
    Verbose,
    checked,
    console,
    no_data,
    out,
    overrides_of,
)
from tasks.environment import prepare

if TYPE_CHECKING:
    from graftline.planning.comparison import Comparison
    from graftline.recipe import Recipe


def compare(
    recipe: RecipePath,
    methods: Annotated[
        str, typer.Option(help="Methods, with commas between them; all continual ones if left out.")
    ] = "",
    seeds: Annotated[str, typer.Option(help="Seeds, with commas between them.")] = "",
    orders: Annotated[
        str,
        typer.Option(
            help="default; latin: each modality once in each place; all; or a,b,c,d;b,a,d,c;..."
        ),
    ] = "default",
    order_seeds: Annotated[
        str | None,
        typer.Option(metavar="SEEDS", help="Seeds of orders other than the recipe's."),
    ] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Another recipe's name, whose reports come beside."),
    ] = None,
    trust_reports: Annotated[
        bool,
        typer.Option(
            "--trust-reports",
            help="A run whose report is of this very version of recipe, data and code is finished, "
            "even if its artifacts are not here, as after a clone.",
        ),
    ] = False,
    target: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Folder of tables, page and pictures; reports/<recipe>/compare if left out.",
        ),
    ] = None,
    settings: Settings = None,
    budget: Annotated[
        bool, typer.Option("--budget", help="Only say what is cached and what must run.")
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Compare methods over orders and seeds; what is finished already is reused."""
    prepare(verbose=verbose)
    overrides = overrides_of(None, None, settings)
    chosen = checked(recipe, overrides)
    arguments: dict[str, Any] = {
        "methods": [name for name in methods.split(",") if name.strip()],
        "seeds": seeds or str(chosen.seed),
        "orders": orders,
        "order_seeds": order_seeds,
    }
    from graftline.planning.comparison import comparison_of

    wanted = comparison_of(chosen.order, **arguments)  # its problems, before anything starts
    if budget:
        text = _budget(recipe, chosen, wanted, overrides, trust_reports)
        if text is None:
            raise no_data(chosen, recipe)
        out.print(text, markup=False, highlight=False, soft_wrap=True)
        return
    from flows.running import run_comparison

    def announce() -> None:
        known = _budget(recipe, chosen, wanted, overrides, trust_reports)
        text = known or "data must be built first"
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    rest = {"also": also or [], "trust_reports": trust_reports, "overrides": overrides}
    rest |= {"out": str(target)} if target is not None else {}
    folder = Path(run_comparison(str(recipe), {**arguments, **rest}, console, announce))
    table = (folder / "table.md").read_text(encoding="utf-8")
    out.print(table, markup=False, highlight=False, soft_wrap=True)
    from tasks.outputs import comparison_files

    for path in comparison_files(folder):
        out.print(str(path), soft_wrap=True)


def _budget(
    path: Path,
    recipe: Recipe,
    wanted: Comparison,
    overrides: dict[str, Any],
    trust_reports: bool,
) -> str | None:
    """What the comparison will cost; `None` while there are no data to plan with."""
    from tasks.own_data import whole_data

    data = whole_data(recipe)
    if data is None:
        return None
    from graftline.planning.budget import budget_of, plans_of
    from graftline.stores import open_store
    from tasks.comparing import reported_runs
    from tasks.outputs import usual_order

    plans = plans_of(str(path), wanted, overrides, data.files)
    reported = reported_runs(plans, usual_order(str(path))) if trust_reports else set()
    said = []
    if trust_reports:
        said.append(f"{len(reported)} of {len(plans)} runs are finished by their reports")
    lacking = [plan for run, plan in plans if run not in reported]
    if lacking:
        said.append(budget_of(lacking, open_store(recipe.store, verify="quick")).text())
    return "\n".join(said)
