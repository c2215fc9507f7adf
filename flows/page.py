"""The page of `graftline app`: media and a question in, one or two models' answers out.

Unless another `--host` is asked for, nothing leaves this machine: the server listens on loopback.
The page may fetch from its own server alone, and Gradio's telemetry, shared links and fonts from
afar are off.
"""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from graftline.asking.asker import Asker
from graftline.asking.conversation import Turn, check_question
from graftline.data.files import MAX_FILE_BYTES
from graftline.errors import GraftlineError
from tasks.choices import Choice

NOBODY = "nobody: one answer only"
WORDLESS = "(it ends without a word)"
_KEPT = 2
"""Models in memory: as many as are compared."""
_ENDINGS = {"audio": [".wav"], "point_cloud": [".ply"], "features": [".npy"]}
"""Kinds of media whose files have one ending."""
_PREVIEWED = ("image", "audio", "video")
LOOPBACK = ("127.0.0.1", "localhost")
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; media-src 'self' data: blob:; "
    "font-src 'self' data:; worker-src 'self' blob:; frame-ancestors 'none'"
)
"""Of a page that may fetch from its own server alone; Gradio's scripts stand in the page itself."""


class Models:
    """The models that can be chosen; the last two that were asked stay in memory.

    Args:
        choices: in the order in which they are shown.
        device: as in a recipe.
    """

    def __init__(self, choices: Sequence[Choice], device: str) -> None:
        self.choices = {choice.label: choice for choice in choices}
        self._device = device
        self._loaded: dict[str, Asker] = {}

    @property
    def kinds(self) -> dict[str, str]:
        """What can be shown to any of them: modality -> what its media are."""
        return {name: kind for each in self.choices.values() for name, kind in each.kinds.items()}

    def asker(self, label: str) -> Asker:
        """The model of this name.

        Raises:
            GraftlineError: a part of it is missing or damaged.
        """
        asker = self._loaded.pop(label, None)
        if asker is None:
            while len(self._loaded) >= _KEPT:
                del self._loaded[next(iter(self._loaded))]
            asker = Asker(self.choices[label].parts(), self._device)
        self._loaded[label] = asker
        return asker

    def answer(self, label: str, media: Mapping[str, str], question: str) -> tuple[str, list[str]]:
        """A model's answer, and what was done to the media.

        Args:
            label: which model.
            media: modality -> file.
            question: the text.

        Raises:
            GraftlineError: lists what cannot be asked.
        """
        text, asker = check_question(question), self.asker(label)
        read, problems = [], []
        for modality, path in media.items():
            # Another model may call the same kind of media otherwise.
            name = modality if modality in asker.modalities else self.kinds.get(modality, modality)
            try:
                read.append(asker.read(Path(path), name))
            except GraftlineError as error:
                problems.append(_named(error, path))
        if problems:
            raise GraftlineError("\n".join(problems))
        shown = asker.show(read, [Path(path) for path in media.values()])
        notes = [_named(note, path) for note, path in _notes(read, media)]
        return asker.answer([[Turn(tuple(shown), text)]])[0], notes


def _notes(read: Sequence[Any], media: Mapping[str, str]) -> list[tuple[str, str]]:
    pairs = zip(read, media.values(), strict=True)
    return [(note, path) for medium, path in pairs for note in medium.notes]


def _named(text: object, path: str) -> str:
    """A message with a file's own name in place of where the upload lies."""
    return str(text).replace(path, Path(path).name)


def answers(
    models: Models, media: Mapping[str, str], question: str, chosen: Sequence[str]
) -> tuple[list[str], str]:
    """Every chosen model's answer, and one text of notes and problems.

    Args:
        models: all of them.
        media: modality -> file.
        question: the text.
        chosen: labels; `NOBODY` answers nothing.
    """
    said, notes = [], dict[str, None]()
    for label in chosen:
        text = ""
        if label != NOBODY:
            try:
                text, own = models.answer(label, media, question)
                text = text if text.strip() else WORDLESS
                notes |= dict.fromkeys(own)
            except GraftlineError as error:
                notes[str(error)] = None
        said.append(text)
    return said, "\n".join(notes)


def build(models: Models, name: str) -> Any:
    """The page as Gradio's blocks.

    Args:
        models: what can be chosen.
        name: what stands above.
    """
    import gradio as gr

    labels = list(models.choices)
    kinds = models.kinds

    def ask(question: str, left: str, right: str, *files: str | None) -> tuple[str, str, str]:
        media = {m: f for m, f in zip(kinds, files, strict=True) if f}
        (first, second), notes = answers(models, media, question, (left, right))
        return first, second, notes

    with gr.Blocks(title=f"Graftline: {name}", analytics_enabled=False) as page:
        gr.Markdown(f"# Graftline: {name}\nDrop media, ask, and compare two models' answers.")
        files = []
        with gr.Row():
            for modality, kind in kinds.items():
                with gr.Column(min_width=180):
                    file = gr.File(
                        label=modality.replace("_", " "),
                        file_types=_ENDINGS.get(kind),
                        height=130,
                        elem_id=f"file-{modality}",
                    )
                    files.append(file)
                    if kind in _PREVIEWED:
                        _preview(gr, file, kind)
        question = gr.Textbox(label="question", value="What is this?", elem_id="question")
        button = gr.Button("Ask", variant="primary", elem_id="ask")
        with gr.Row():
            sides = [
                _side(gr, labels, labels[0], "left"),
                _side(gr, [NOBODY, *labels], _rival(labels), "right"),
            ]
        notes = gr.Textbox(label="notes", interactive=False, elem_id="notes")
        chosen, said = zip(*sides, strict=True)
        for event in (button.click, question.submit):
            event(
                ask,
                [question, *chosen, *files],
                [*said, notes],
                concurrency_limit=1,
                concurrency_id="model",
                api_visibility="private",
            )
    return page


def _preview(gr: Any, file: Any, kind: str) -> None:
    player = gr.Audio if kind == "audio" else gr.Image
    size = {} if kind == "audio" else {"height": 130}
    shown = player(show_label=False, interactive=False, visible=False, buttons=[], **size)
    file.change(
        lambda path: gr.update(value=path, visible=path is not None),
        file,
        shown,
        api_visibility="private",
    )


def _side(gr: Any, labels: Sequence[str], value: str, name: str) -> tuple[Any, Any]:
    with gr.Column():
        chosen = gr.Dropdown(
            list(labels), value=value, label="model", interactive=True, elem_id=f"model-{name}"
        )
        said = gr.Textbox(label="answer", interactive=False, lines=2, elem_id=f"answer-{name}")
    return chosen, said


def _rival(labels: Sequence[str]) -> str:
    """Another method's model to compare the first with; else nobody."""
    method = labels[0].partition(" · ")[0]
    return next((each for each in labels if each.partition(" · ")[0] != method), NOBODY)


def serve(models: Models, name: str, host: str, port: int, ready: Callable[[], None]) -> None:
    """Serves the page until SIGINT or SIGTERM; uploads are deleted then.

    Args:
        models: what can be chosen.
        name: what stands above.
        host: address to listen on.
        port: port to listen on.
        ready: called when it serves.

    Raises:
        GraftlineError: it does not start.
    """
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    plain = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    with tempfile.TemporaryDirectory() as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads  # which components look up when they are made
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        gr.mount_gradio_app(
            app, build(models, name), path="/", server_name=host, server_port=port, theme=plain,
            footer_links=[], ssr_mode=False, pwa=False, mcp_server=False, run_history=False,
            enable_monitoring=False, max_file_size=MAX_FILE_BYTES,
        )  # fmt: skip
        app.add_middleware(FromHereAlone)
        if host in LOOPBACK:  # a name that others point here is refused
            app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(LOOPBACK))
        config = uvicorn.Config(
            app, host=host, port=port, log_level="error", timeout_graceful_shutdown=2
        )
        _until_stopped(uvicorn.Server(config), ready)


def _until_stopped(server: Any, ready: Callable[[], None]) -> None:
    """Runs a server in a thread, so that a signal stops it and this process still tidies up."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        server.should_exit = True

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    thread = threading.Thread(target=server.run, name="page")
    thread.start()
    while thread.is_alive() and not server.started:
        time.sleep(0.05)
    if not server.started and not server.should_exit:
        raise GraftlineError("the page could not be served; choose another --port")
    if server.started:
        ready()
    thread.join()


class FromHereAlone:
    """Tells the browser to fetch from this server alone.

    Args:
        app: what answers.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers one request."""

        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                own = [(b"content-security-policy", POLICY.encode())]
                message = {**message, "headers": [*message.get("headers", []), *own]}
            await send(message)

        await self._app(scope, receive, with_policy if scope["type"] == "http" else send)
