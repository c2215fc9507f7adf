"""Publish into an object store, killed at one boundary of its writes.

A script for `test_shared_store.py`. Arguments: the store's URL, a folder for the copies of each
writer, how many boundaries there are. Writer `n` publishes the fingerprint `f<n>` and dies at the
n-th boundary: before its first write to the object store, after it, before the second, ...
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import s3fs

from graftline.sharing.store import CACHE_VARIABLE
from graftline.stores import open_store


def build(folder: Path) -> None:
    """Write two files of different content."""
    (folder / "weights").mkdir()
    (folder / "weights" / "a.bin").write_bytes(b"0123456789")
    (folder / "b.bin").write_bytes(b"abc")


def deadly(name: str, count: list[int]) -> None:
    """Let a write of the file system count down to the end of this process."""
    original = getattr(s3fs.S3FileSystem, name)

    def write(*arguments: Any, **named: Any) -> Any:
        if any("/.claims/" in str(each) for each in arguments):
            return original(*arguments, **named)  # no part of an artifact
        tick()
        result = original(*arguments, **named)
        tick()
        return result

    def tick() -> None:
        count[0] -= 1
        if count[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(s3fs.S3FileSystem, name, write)


def main(url: str, folder: Path, boundaries: int) -> None:
    """Fork a writer for each boundary before anything is connected."""
    for number in range(1, boundaries + 1):
        child = os.fork()
        if child == 0:
            os.environ[CACHE_VARIABLE] = str(folder / str(number))
            count = [number]
            deadly("put_file", count)
            deadly("pipe_file", count)
            store = open_store(url)
            given: dict[str, Any] = {"parameters": {}, "parents": {}, "code": "c"}
            store.publish("merge", f"f{number}", **given, build=build)
            os._exit(0)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
