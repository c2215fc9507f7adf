"""The command line `graftline`. Heavy modules are imported only by the commands that need them."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

from tasks.environment import prepare

prepare()

import typer  # noqa: E402

from flows import cli_data, cli_lab, cli_plan, cli_use  # noqa: E402
from flows.cli_add import add  # noqa: E402
from flows.cli_app import app as page  # noqa: E402
from flows.cli_compare import compare  # noqa: E402
from flows.cli_drift import drift  # noqa: E402
from flows.cli_parts import combine, take_apart  # noqa: E402
from flows.options import (  # noqa: E402
    Method,
    RecipePath,
    Seed,
    Settings,
    Verbose,
    checked,
    console,
    no_data,
    out,
    overrides_of,
)
from graftline.errors import GraftlineError  # noqa: E402
from tasks.interruption import stop_on_signals  # noqa: E402
from tasks.server import UI_PORT  # noqa: E402

EXIT_FAILED = 1
app = typer.Typer(
    name="graftline",
    help="Grow a multimodal LLM one modality at a time without hurting what it already knows.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command()(compare)
app.command()(drift)
app.command()(add)
app.command()(take_apart)
app.command()(combine)
app.command("app")(page)
data_app = typer.Typer(help="A recipe's own data, and the starter's.", no_args_is_help=True)
app.add_typer(data_app, name="data")
cli_data.register(data_app)
app.command()(cli_plan.plan)
cli_use.register(app)
cli_lab.register(app)


@app.command()
def run(
    recipe: RecipePath,
    method: Method = None,
    seed: Seed = None,
    settings: Settings = None,
    verbose: Verbose = False,
) -> None:
    """Run a recipe from data to report; what is finished already is reused."""
    prepare(verbose=verbose)
    overrides = overrides_of(method, seed, settings)
    chosen = checked(recipe, overrides)
    from flows.running import run_recipe

    console.print(
        f"[bold]{chosen.name}[/]: {chosen.method}, {' → '.join(chosen.order)}, seed {chosen.seed}"
    )
    folder = run_recipe(str(recipe), overrides, console)
    from flows.showing import print_report

    print_report(out, folder)
    out.print(
        "\nCompare runs: [bold]graftline ui[/]    Another method: add [bold]--method finetune[/]"
    )


@app.command()
def show(
    recipe: RecipePath, method: Method = None, seed: Seed = None, settings: Settings = None
) -> None:
    """Print the table of a finished run and where its pictures lie."""
    overrides = overrides_of(method, seed, settings)
    chosen = checked(recipe, overrides)
    from flows.showing import print_report
    from tasks.outputs import report_folder, usual_order

    folder = report_folder(chosen, usual_order(recipe))
    if not (folder / "metrics.json").exists():
        words = ["graftline run", str(recipe)]
        words += [f"--method {method}"] if method else []
        words += [f"--seed {seed}"] if seed is not None else []
        words += [f"--set {shlex.quote(text)}" for text in settings or []]
        raise GraftlineError(f"{folder} holds no report yet; run: {' '.join(words)}")
    print_report(out, folder)


@app.command()
def table(
    recipe: RecipePath,
    composition: Annotated[
        bool,
        typer.Option(
            "--composition",
            help="Only methods that combine experts; also writes reports/<recipe>/compose/.",
        ),
    ] = False,
    also: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Another recipe's name, whose rows come behind."),
    ] = None,
) -> None:
    """Print every finished method of a recipe side by side, over its seeds, as Markdown."""
    from flows.showing import summary_of
    from tasks.outputs import compose_folder, finished_reports, reports_also

    name = checked(recipe, {}).name
    folders = finished_reports(name)
    folders += [folder for each in also or [] for folder in reports_also(each)]
    if composition:
        from graftline.recipe import COMPOSITIONS

        folders = [folder for folder in folders if folder.parent.name in COMPOSITIONS]
    if not folders:
        what, which = ("composition", " --method mmer") if composition else ("run", "")
        raise GraftlineError(
            f"no {what} of {recipe} is finished yet; run: graftline run {recipe}{which}"
        )
    text = summary_of(folders, compose_folder(name) if composition else None)
    out.print(text, soft_wrap=True, markup=False, highlight=False)


@app.command()
def search(
    recipe: RecipePath,
    rule: Annotated[
        list[str] | None,
        typer.Option(
            help="A merge rule, finetune, connector-only, joint, mera, mera+, or a method against "
            "forgetting; all rules that have parameters if left out, with --rates all methods with "
            "a learning rate."
        ),
    ] = None,
    rates: Annotated[
        bool,
        typer.Option(
            "--rates",
            help="Search the learning rate and the steps: of finetune by what the newest modality "
            "scores, of other methods by what all score at the end.",
        ),
    ] = False,
    seed: Seed = None,
    settings: Settings = None,
    budget: Annotated[
        bool, typer.Option("--budget", help="Only say what is cached and what must run.")
    ] = False,
) -> None:
    """Choose methods' parameters on validation rows, with the same small budget for each."""
    prepare()
    overrides = overrides_of(None, seed, settings)
    checked(recipe, overrides)
    from flows import searching
    from graftline.methods.search import CANDIDATES, RATED

    path, rules = str(recipe), rule or list(RATED if rates else CANDIDATES)
    trials = searching.trials_of(path, rules, overrides, rates=rates)
    if budget:
        known = searching.budget(path, trials)
        if known is None:
            raise no_data(trials.recipe, recipe)
        out.print(known, markup=False, highlight=False, soft_wrap=True)
        return
    for file in searching.search(path, trials, console):
        out.print(
            f"{searching.describe(file)}\n   {file}", markup=False, highlight=False, soft_wrap=True
        )


@app.command()
def ui(
    mlflow_port: Annotated[int, typer.Option(help="Port of the MLflow UI; 0: a free one.")] = 5000,
    prefect_port: Annotated[
        int, typer.Option(help="Port of the Prefect UI; 0: any free.")
    ] = UI_PORT,
) -> None:
    """Start the MLflow UI and the Prefect UI on loopback, until Ctrl-C."""
    from tasks.ui import serve_both

    serve_both(mlflow_port, prefect_port, out.print)


@app.command()
def merge(
    rule: Annotated[str, typer.Option(help="average, task-arithmetic, ties, mmer, emr ...")],
    base: Annotated[
        str, typer.Option(help="Checkpoint that the experts started from: folder or s3://...")
    ],
    expert: Annotated[
        list[str], typer.Option(help="Checkpoint or PEFT LoRA: folder or s3://...; one or more.")
    ],
    folder: Annotated[Path, typer.Option("--out", help="Folder to make.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A parameter of the rule, e.g. scale=0.5."),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(metavar="PREFIX[=CHECKPOINT]", help="Tensors to take over unmerged."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of random choices (dare-ties).")] = 0,
    shard_gigabytes: Annotated[float, typer.Option(help="Most gigabytes in one file.")] = 5.0,
) -> None:
    """Merge checkpoints in little memory; the result appears whole or not at all."""
    from flows import merging

    report = merging.merge(
        rule,
        base,
        expert,
        folder,
        settings=settings or [],
        keep=keep or [],
        seed=seed,
        shard_gigabytes=shard_gigabytes,
        console=console,
    )
    out.print(merging.summary(report), markup=False, highlight=False)


@data_app.command("build")
def data_build(
    folder: Annotated[Path, typer.Option(help="Where the data go.")] = Path("data"),
    force: Annotated[
        bool, typer.Option("--force", help="Replace the starter's data that are there.")
    ] = False,
) -> None:
    """Build the starter's data; the same bytes every time."""
    from graftline.data.build import build, directory_md5, require_replaceable
    from graftline.progress import shown
    from tasks.data import bar, is_filled

    require_replaceable(folder)
    if is_filled(folder) and not force:
        raise GraftlineError(f"{folder} is not empty; add --force to replace it")
    with shown(console), bar() as progress:
        build(folder, progress=progress)
    out.print(f"{folder}: md5 {directory_md5(folder)}")


@data_app.command("verify")
def data_verify(
    folder: Annotated[Path, typer.Option(help="The data folder.")] = Path("data"),
) -> None:
    """Compare the data with what data.dvc records; name each file that differs."""
    from graftline.data.build import STARTERS_FILES, checksums, recorded, verify
    from tasks.data import pointer

    source = pointer(folder)
    problems = verify(folder, source)
    if problems:
        listed = "\n  ".join(problems)
        advice = "Restore them with `dvc checkout`"
        if checksums(folder).keys() | recorded(source)[1].keys() <= STARTERS_FILES:
            advice += f", or rebuild them with `graftline data build --folder {folder} --force`"
        raise GraftlineError(
            f"{len(problems)} file(s) differ from {source}:\n  {listed}\n{advice}."
        )
    out.print(f"{folder} is what {source} records: md5 {recorded(source)[0]}")


def main() -> None:
    """Entry point of `graftline`: errors without traceback, honest exit codes."""
    stop_on_signals()
    logging.getLogger("graftline.store").setLevel(logging.INFO)
    logging.getLogger("graftline.store").addHandler(_ToConsole())
    logging.getLogger("tasks").setLevel(logging.INFO)
    logging.getLogger("tasks").addHandler(_ToConsole())
    _guard(app)


def _guard(command: Callable[[], Any]) -> NoReturn:
    try:
        command()
    except GraftlineError as error:
        console.print(f"[bold red]Error:[/] {_plain(error)}", highlight=False, soft_wrap=True)
        sys.exit(EXIT_FAILED)
    sys.exit(0)


def _plain(error: GraftlineError) -> str:
    from rich.markup import escape

    return escape(str(error))


class _ToConsole(logging.Handler):
    """Shows what the library and the tasks have to say beside the progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else "dim"
        console.print(record.getMessage(), style=style, markup=False, highlight=False)


if __name__ == "__main__":
    main()
