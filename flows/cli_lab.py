"""`graftline deploy` and `graftline work`: one project on many machines."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Annotated

import typer

from flows.options import console, out


def deploy(
    slots: Annotated[
        int | None,
        typer.Option(
            min=1, help="Steps that compute at once, over all machines; unchanged if left out."
        ),
    ] = None,
) -> None:
    """Make work pool, slots and deployments on the lab's Prefect server, or update them."""
    from tasks.lab import POOL, deploy_flows, prepare_lab, require_server
    from tasks.server import wait_for

    url = require_server()
    with console.status("deploying"):
        wait_for(url)
        there = prepare_lab(slots)
        deploy_flows(Path.cwd())
    out.print(f"{url}: pool {POOL}, {there} slot(s), deployments of prefect.yaml", highlight=False)
    out.print("On each machine: [bold]graftline work[/]")


def work(
    slots: Annotated[int, typer.Option(min=1, help="Steps at once on this machine.")] = 1,
    name: Annotated[
        str | None, typer.Option(help="What the lab calls this machine; its host name if left out.")
    ] = None,
) -> None:
    """Carry out what the lab's Prefect server has for this machine, until Ctrl-C."""
    from tasks.lab import require_server, serve_work

    url = require_server()
    called = name or socket.gethostname()
    out.print(f"{called}: {slots} slot(s) for {url}; Ctrl-C stops", highlight=False)
    serve_work(slots, called, Path.cwd())


def register(app: typer.Typer) -> None:
    """Adds the commands to the command line."""
    app.command()(deploy)
    app.command()(work)
