"""An S3-speaking server on loopback for tests, in this process and in memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

BUCKET = "lab"
_INSTALL = "install graftline[s3,test] for this test"
KEYS = {"AWS_ACCESS_KEY_ID": "graftline", "AWS_SECRET_ACCESS_KEY": "planted-secret-4711"}


class ObjectStore:
    """A server with one bucket; what it holds outlives its being stopped.

    Skips the test where the extras `s3` and `test` are not installed.

    Attributes:
        environment: variables that lead to it, once it was started.
    """

    def __init__(self) -> None:
        self._moto = pytest.importorskip("moto.server", reason=_INSTALL)
        self._s3fs = pytest.importorskip("s3fs", reason=_INSTALL)
        self._server: Any = None
        self._port = 0
        self.environment: dict[str, str] = {}

    def start(self) -> None:
        """Starts it, at the same address as before."""
        self._server = self._moto.ThreadedMotoServer(
            ip_address="127.0.0.1", port=self._port, verbose=False
        )
        self._server.start()
        host, port = self._server.get_host_and_port()
        if self._port:
            return
        self._port = port
        self.environment = {
            **KEYS,
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        files = self._s3fs.S3FileSystem(
            key=KEYS["AWS_ACCESS_KEY_ID"],
            secret=KEYS["AWS_SECRET_ACCESS_KEY"],
            endpoint_url=self.environment["AWS_ENDPOINT_URL"],
            skip_instance_cache=True,
        )
        with suppress(FileExistsError):  # all servers of this process hold the same
            files.mkdir(BUCKET)

    def stop(self) -> None:
        """Stops it; nothing listens any more."""
        if self._server is not None:
            self._server.stop()
            self._server._server.server_close()  # or it would go on accepting connections
            self._server = None


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """A server with one empty bucket; yields the environment that leads to it."""
    store = ObjectStore()
    try:
        store.start()
        yield store.environment
    finally:
        store.stop()
