"""Starting the main flow on this machine: server, imports and progress bars around it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tasks.server import Server

if TYPE_CHECKING:
    from rich.console import Console

    from graftline.recipe import Recipe


def run_recipe(path: str, recipe: Recipe, overrides: Mapping[str, Any], console: Console) -> str:
    """Runs the flow `continual` and returns the report's folder.

    Args:
        path: the recipe's file.
        recipe: what it says, with the overrides.
        overrides: dotted key -> value.
        console: for progress bars.

    Raises:
        GraftlineError: the run cannot be done; finished steps are kept.
    """
    with Server() as server:
        with console.status("starting") if console.is_terminal else _nothing():
            from flows.continual import continual
            from graftline.progress import shown

            server.wait()
            _quiet()
        name = f"{recipe.name} {recipe.method} seed {recipe.seed}"
        try:
            with shown(console):
                return continual.with_options(flow_run_name=name)(path, dict(overrides))
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


def _nothing() -> Any:
    from contextlib import nullcontext

    return nullcontext()
