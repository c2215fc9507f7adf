"""Starting the main flow on this machine: server, imports and progress bars around it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from graftline.recipe import Recipe
from graftline.settings.reading import load_recipe
from tasks.server import Server

if TYPE_CHECKING:
    from rich.console import Console


def run_recipe(path: str, overrides: Mapping[str, Any], console: Console) -> str:
    """Runs the flow `continual` once and returns the report's folder.

    Args:
        path: the recipe's file.
        overrides: dotted key -> value that wins over the file.
        console: for progress bars.

    Raises:
        GraftlineError: the run cannot be done; finished steps are kept.
    """
    recipe = load_recipe(path, overrides)
    with _serving(console):
        from flows.continual import continual
        from graftline.progress import shown

        _say_if_widened(recipe, console)
        name = f"{recipe.name} {recipe.method} seed {recipe.seed}"
        with shown(console):
            return str(continual.with_options(flow_run_name=name)(path, dict(overrides)))


def run_several(
    path: str, runs: Sequence[Mapping[str, Any]], console: Console, announce: Callable[[], None]
) -> list[dict[str, Any]]:
    """Runs the flow `several` and returns the metrics of each run.

    Args:
        path: the recipe's file.
        runs: for each run, dotted key -> value that wins over the file.
        console: for progress bars.
        announce: as for `run_comparison`.

    Raises:
        GraftlineError: a run cannot be done; finished steps and runs are kept.
    """
    with _serving(console):
        announce()
        from flows.several import several
        from graftline.progress import shown

        _say_if_widened(load_recipe(path, runs[0]), console)
        with shown(console):
            return several(path, [dict(changes) for changes in runs])


def run_comparison(
    path: str, arguments: Mapping[str, Any], console: Console, announce: Callable[[], None]
) -> str:
    """Runs the flow `compare` once and returns the comparison's folder.

    Args:
        path: the recipe's file.
        arguments: the flow's other arguments.
        console: for progress bars.
        announce: says what will be done. It may load Prefect, which must know its server by then:
            else Prefect starts one of its own, that nobody stops.

    Raises:
        GraftlineError: a run cannot be done; finished steps and runs are kept.
    """
    with _serving(console):
        announce()
        from flows.compare import compare
        from graftline.progress import shown

        with shown(console):
            return str(compare(path, **arguments))


def run_addition(
    path: str, model: str, out: str, overrides: Mapping[str, Any], console: Console
) -> str:
    """Runs the flow `add` once and returns the report's folder.

    Args:
        path: the recipe's file.
        model: the exported model.
        out: folder to make, for the new one.
        overrides: dotted key -> value that wins over the file.
        console: for progress bars.

    Raises:
        GraftlineError: a stage cannot be added; finished steps are kept.
    """
    with _serving(console):
        from flows.adding import add
        from graftline.progress import shown

        with shown(console):
            return str(add(path, model, out, dict(overrides)))


def _say_if_widened(recipe: Recipe, console: Console) -> None:
    from graftline.model.opening import is_widened
    from graftline.planning.problems import device_problems

    if device_problems(recipe.execution.device):
        return  # the run refuses it, with all else that stands in its way
    if is_widened(recipe):
        console.print(
            "[dim]This CPU does not multiply bfloat16: computing in float32; what is stored stays "
            "bfloat16.[/]"
        )


@contextmanager
def _serving(console: Console) -> Iterator[None]:
    """A server while the context lasts; the flows are imported while it starts."""
    with Server() as server:
        with console.status("starting") if console.is_terminal else nullcontext():
            import flows.continual  # noqa: F401  # it takes seconds, and so does the server

            server.wait()
            _quiet()
        try:
            yield
        finally:
            if server.own:
                drain()


def drain() -> None:
    """Sends what Prefect has not sent yet, so that nothing looks for a server that is gone."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    for worker in (APILogWorker, EventsWorker):
        worker.drain_all(timeout=5, at_exit=False)


def _quiet() -> None:
    """Keeps MLflow's and Alembic's chatter off the console."""
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
