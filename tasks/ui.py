"""The two user interfaces, on loopback, as children that never outlive this process.

`python -m tasks.ui <mlflow arguments>` is the child that serves MLflow: MLflow starts workers of
its own, so the child is the leader of a process group and takes the whole group with it.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress

from graftline.errors import GraftlineError
from graftline.object_urls import without_credentials
from graftline.steps.supervised import start_child, stop_child, when_parent_ends
from tasks import environment
from tasks.server import START_SECONDS, Server
from tasks.tracking import FOLDER, is_server, tracking_uri


def serve_both(mlflow_port: int, prefect_port: int, say: Callable[[str], None]) -> None:
    """Serves the MLflow UI and the Prefect UI until SIGINT or SIGTERM.

    Where `MLFLOW_TRACKING_URI` or `PREFECT_API_URL` names a server, that one is told instead.

    Args:
        mlflow_port: port for MLflow; 0 chooses a free one.
        prefect_port: port for Prefect; 0 chooses a free one.
        say: told where they are.

    Raises:
        GraftlineError: a port is in use, or an interface does not start.
    """
    environment.prepare()
    for name, port in (("--mlflow-port", mlflow_port), ("--prefect-port", prefect_port)):
        require_free(name, port)
    elsewhere, mlflow_port = tracking_uri(), mlflow_port or free_port()
    child = None
    if not is_server(elsewhere):
        child = start_child(["-m", "tasks.ui", str(mlflow_port)])
    try:
        with Server(with_ui=True, port=prefect_port) as prefect:
            own = f"http://127.0.0.1:{mlflow_port}"
            if child is not None:
                _wait(f"{own}/health", child)
            url = prefect.wait().removesuffix("/api")
            say(f"MLflow:  {own if child is not None else without_credentials(elsewhere)}")
            say(f"Prefect: {url}")
            say("Ctrl-C stops what was started here.")
            while child is None or child.poll() is None:
                time.sleep(0.2)
            raise GraftlineError("the MLflow UI ended by itself; start `graftline ui` again")
    finally:
        if child is not None:
            stop_child(child)


def require_free(option: str, port: int) -> None:
    """Raises a GraftlineError if a port of loopback cannot be had; it names the option."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            why = error.strerror if isinstance(error, OSError) else "ports go up to 65535"
            raise GraftlineError(
                f"port {port} cannot be used ({why}); choose another one with {option}, or 0 for "
                "any free one"
            ) from error


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(url: str, child: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while child.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=2):  # noqa: S310
                return
        except OSError:
            time.sleep(0.2)
    raise GraftlineError("the MLflow UI did not start; try `python -m tasks.ui 5000` to see why")


def _serve_mlflow(port: int) -> None:
    """The child: runs MLflow's server and ends it, workers and all, with the parent."""
    FOLDER.mkdir(exist_ok=True)
    arguments = [
        sys.executable, "-m", "mlflow", "ui", "--host", "127.0.0.1", "--port", str(port),
        "--backend-store-uri", tracking_uri(), "--workers", "1",
        "--default-artifact-root", (FOLDER / "artifacts").absolute().as_uri(),
    ]  # fmt: skip
    # It writes a line a request: nobody reads this process's output, and a full pipe would stop it.
    server = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())

    when_parent_ends(ended.set)
    while server.poll() is None and not ended.wait(0.1):
        pass
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(os.getpgid(0), signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        server.wait(2)
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    _serve_mlflow(int(sys.argv[1]))
