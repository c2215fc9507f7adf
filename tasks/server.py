"""The Prefect API server of a run: the user's where one is configured, else a child of ours.

`python -m tasks.server` is the child. It listens on the loopback interface and a free port,
writes that port to standard output as soon as it has it and `ready` once it serves, and ends
with its parent.
"""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import TracebackType

from graftline.durable import why_unwritable
from graftline.errors import GraftlineError
from graftline.object_urls import without_credentials
from graftline.steps.supervised import start_child, stop_child, when_parent_ends

HOME = Path(".prefect")
UI_PORT = 4200
"""Where `graftline ui` serves Prefect's pages unless told otherwise."""
START_SECONDS = 300.0
"""How long a server that still runs may take to serve: on a machine with other work it does."""
_ANSWER_SECONDS = 60.0
_QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_LOGGING_LEVEL": "ERROR",
}
# What a server without deployments, schedules and workers has no use for.
_SERVICES_OFF = {
    f"PREFECT_SERVER_SERVICES_{name}_ENABLED": "false"
    for name in (
        "SCHEDULER",
        "LATE_RUNS",
        "FOREMAN",
        "PAUSE_EXPIRATIONS",
        "CANCELLATION_CLEANUP",
        "REPOSSESSOR",
        "TRIGGERS",
        "EVENT_LOGGER",
    )
}


def configured_url() -> str | None:
    """The API that the user configured, by `PREFECT_API_URL` or the active Prefect profile.

    Raises:
        GraftlineError: it is no URL.
    """
    url = os.environ.get("PREFECT_API_URL") or _url_of_profile()
    if url and not url.lower().startswith(("http://", "https://")):
        said = without_credentials(url)
        right = f"http://{said.rpartition('://')[2]}"
        raise GraftlineError(f"PREFECT_API_URL: {said} is no address of a server; write {right}")
    return url


def _url_of_profile() -> str | None:
    home = Path(os.environ.get("PREFECT_HOME", "~/.prefect")).expanduser()
    path = Path(os.environ.get("PREFECT_PROFILES_PATH", home / "profiles.toml"))
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    active = os.environ.get("PREFECT_PROFILE", content.get("active"))
    url = content.get("profiles", {}).get(active, {}).get("PREFECT_API_URL")
    return str(url) if url else None


class Server:
    """The Prefect API of this process while the context lasts.

    Entering starts the child (unless the user configured a server) and returns at once, so that
    other things can be imported meanwhile; `wait` returns when it serves.

    Args:
        with_ui: also serve Prefect's UI and keep every background service.
        port: the port to listen on; 0 chooses a free one.
    """

    def __init__(self, *, with_ui: bool = False, port: int = 0) -> None:
        self.with_ui = with_ui
        self.port = port
        self.url = configured_url()
        self.own = self.url is None
        self._child: subprocess.Popen[str] | None = None

    def __enter__(self) -> Server:
        os.environ.update({name: value for name, value in _QUIET.items() if name not in os.environ})
        if self.own:
            home = Path(os.environ.setdefault("PREFECT_HOME", str(HOME.absolute())))
            if (why := why_unwritable(home)) is not None:
                raise GraftlineError(
                    f"{home}: cannot be written ({why}), and Prefect keeps its records there; make "
                    "room or make it writable, go to another folder, or set PREFECT_HOME."
                )
            extra = {} if self.with_ui else _SERVICES_OFF
            arguments = ["-m", "tasks.server", str(self.port), *(["ui"] if self.with_ui else [])]
            self._child = start_child(arguments, extra)
            self.port = int(self._line())
            self.url = f"http://127.0.0.1:{self.port}/api"
            os.environ["PREFECT_API_URL"] = self.url
            # This server ends with the run; the links that it writes are for `graftline ui`.
            os.environ.setdefault("PREFECT_UI_URL", f"http://127.0.0.1:{UI_PORT}")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._child is not None:
            stop_child(self._child)
            os.environ.pop("PREFECT_API_URL", None)
            self._child = None

    def wait(self) -> str:
        """Returns the API's URL when the server serves.

        Raises:
            GraftlineError: the server does not start, or the user's does not answer for a minute.
        """
        if self._child is not None and self._line() != "ready":
            raise GraftlineError(self._failure())
        assert self.url is not None
        if not self.own:
            wait_for(self.url)
        return self.url

    def _line(self) -> str:
        assert self._child is not None
        assert self._child.stdout is not None
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if select.select([self._child.stdout], [], [], 0.5)[0]:
                if line := self._child.stdout.readline().strip():
                    return line
                break
        message = self._failure(late=time.monotonic() >= deadline)
        stop_child(self._child, 0.0)
        raise GraftlineError(message)

    def _failure(self, late: bool = False) -> str:
        within = f" within {START_SECONDS:.0f} s: this machine may be too busy" if late else ""
        return (
            f"Prefect's API server did not start{within}. To see why, run "
            f"`{Path(sys.executable).name} -m tasks.server {self.port}`; or start one yourself "
            "with `prefect server start` and set PREFECT_API_URL."
        )


def wait_for(url: str) -> None:
    """Waits until the user's server answers: one that is just restarted fails no run.

    A client of Prefect's own that has never had an answer fails at its first question.

    Args:
        url: of its API.

    Raises:
        GraftlineError: it does not answer for a minute.
    """
    import httpx

    from tasks.patience import is_away, patiently

    def ask() -> None:
        answer = httpx.get(f"{url.rstrip('/')}/health", timeout=5.0)
        if answer.is_server_error:
            answer.raise_for_status()

    try:
        patiently(ask, f"asking {url} for {_ANSWER_SECONDS:.0f} s", _ANSWER_SECONDS)
    except httpx.HTTPError as error:
        if not is_away(error):
            raise
        raise GraftlineError(
            f"Prefect's server at {url} does not answer. Start it, or unset PREFECT_API_URL "
            "(or the URL of the active Prefect profile) to have a run start one of its own."
        ) from error


def _serve(port: int, with_ui: bool) -> None:
    """The child: bind, tell the port, start, tell that it is ready, serve until the parent ends."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen(128)
    print(listener.getsockname()[1], flush=True)
    address = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
    os.environ.setdefault("PREFECT_UI_API_URL", address)

    from filelock import FileLock

    home = Path(os.environ.get("PREFECT_HOME", HOME))
    home.mkdir(parents=True, exist_ok=True)
    lock = FileLock(home / "server-start.lock")  # two first starts would migrate twice
    lock.acquire()

    import asyncio

    import uvicorn
    from prefect.server.api.server import create_app

    app = create_app(ephemeral=not with_ui, final=True)
    server = uvicorn.Server(
        uvicorn.Config(app, log_level="error", lifespan="on", timeout_graceful_shutdown=2)
    )

    def stop() -> None:
        server.should_exit = True

    when_parent_ends(stop)

    async def run() -> None:
        serving = asyncio.ensure_future(server.serve(sockets=[listener]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.02)
        lock.release()
        if server.started:
            print("ready", flush=True)
        await serving

    asyncio.run(run())


if __name__ == "__main__":
    _serve(int(sys.argv[1]), "ui" in sys.argv[2:])
