"""An S3-speaking server on loopback for tests, in this process and in memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

BUCKET = "lab"
KEYS = {"AWS_ACCESS_KEY_ID": "graftline", "AWS_SECRET_ACCESS_KEY": "planted-secret-4711"}


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """A server with one empty bucket; yields the environment that leads to it.

    Skips the test where the extras `s3` and `test` are not installed.
    """
    moto = pytest.importorskip("moto.server", reason="install graftline[s3,test] for this test")
    s3fs = pytest.importorskip("s3fs", reason="install graftline[s3,test] for this test")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        environment = {
            **KEYS,
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        files = s3fs.S3FileSystem(
            key=KEYS["AWS_ACCESS_KEY_ID"],
            secret=KEYS["AWS_SECRET_ACCESS_KEY"],
            endpoint_url=environment["AWS_ENDPOINT_URL"],
            skip_instance_cache=True,
        )
        files.mkdir(BUCKET)
        yield environment
    finally:
        server.stop()
