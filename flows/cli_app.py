"""`graftline app`: a page on this machine that asks finished models, side by side."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from flows.options import Settings, out, overrides_of
from graftline.errors import GraftlineError

PORT = 7860


def app(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="A recipe, for every stage of its finished runs; exported folders, reports or "
            "registered models (<recipe>@<method>).",
        ),
    ],
    settings: Settings = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0: any free one.")] = PORT,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps ...")] = "auto",
) -> None:
    """Open a page that takes media and a question and compares two models' answers."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from graftline.planning.problems import require_device
    from tasks.choices import choices_of

    require_device(device, "--device")
    choices = choices_of(models, overrides_of(None, None, settings))
    _require_gradio()
    from flows import page
    from tasks.ui import free_port, require_free

    require_free("--port", port)
    port = port or free_port()
    page.serve(
        page.Models(choices, device),
        ", ".join(models),
        host,
        port,
        lambda: out.print(f"http://{host}:{port}    Ctrl-C stops it."),
    )


def _require_gradio() -> None:
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise GraftlineError(
            "the page needs Gradio, which is optional; install it with: "
            "pip install --no-deps -r requirements-app.lock, or: pip install 'graftline[app]'"
        ) from error
