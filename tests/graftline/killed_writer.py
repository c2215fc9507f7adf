"""Publish once, then once more for every write of that run, killed in the middle of it.

A script for `test_store_writers.py`: its argument is a folder for the stores `0`, `1`, ...; it
prints the list of writes as JSON. Store `n` belongs to the writer killed in the n-th write.
"""

from __future__ import annotations

import builtins
import io
import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

from graftline.durable import atomic_write_text
from graftline.store import Store

events: list[str] = []
deadly = 0


def reach(operation: str, path: Any) -> bool:
    """Count one boundary; say whether the process has to die in it."""
    if isinstance(path, int):
        path = os.readlink(f"/proc/self/fd/{path}")
    name = re.sub(r"^\.tmp-(.+?)-\d+-[0-9a-f]{16}$", r".tmp-\1", Path(path).name)
    name = re.sub(r"^\d+$", "root", name)
    if operation == "mkdir" and Path(path).exists():
        return False  # filelock makes sure of its folder
    events.append(f"{operation}:{name}")
    return len(events) == deadly


def die() -> None:
    """End as a power cut would: without any cleaning up."""
    os.kill(os.getpid(), signal.SIGKILL)


def watch(name: str) -> None:
    """Make a function of `os` a boundary."""
    original = getattr(os, name)

    def watched(path: Any, *arguments: Any, **named: Any) -> Any:
        if reach(name, path):
            die()
        return original(path, *arguments, **named)

    setattr(os, name, watched)


class Half:
    """A file whose deadly write gets half of its content to the disk."""

    def __init__(self, file: Any, path: Any) -> None:
        self.file, self.path = file, path

    def __enter__(self) -> Half:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, content: Any) -> Any:
        """Write all, or half and die."""
        if reach("write", self.path):
            self.file.write(content[: len(content) // 2])
            self.file.flush()
            die()
        return self.file.write(content)


original_open: Any = io.open


def watched_open(path: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
    """Open a file; opening it for writing and each write are boundaries."""
    writes = set(mode) & set("wax+") and not isinstance(path, int)
    if writes and reach("open", path):
        die()
    file = original_open(path, mode, *arguments, **named)
    return Half(file, path) if writes else file


def build(folder: Path) -> None:
    """Write one file below a folder and one beside it."""
    (folder / "weights").mkdir()
    for name in ["weights/a.bin", "b.bin"]:
        with open(folder / name, "wb") as file:
            file.write(b"0123456789")


def run(root: Path) -> None:
    """Leave a checkpoint and publish, as a step does."""
    store = Store(root)
    with store.lock("merge", "f1"):
        work = store.work_folder("merge", "f1")
        atomic_write_text(work / "state.json", "{}")
        store.publish("merge", "f1", parameters={}, parents={}, code="c", build=build)


def main(folder: Path) -> None:
    """Run once to learn the boundaries, then fork a writer for each."""
    global deadly
    for name in ["mkdir", "fsync", "rename", "replace", "unlink", "rmdir"]:
        watch(name)
    replaced: Any = watched_open
    builtins.open = io.open = replaced
    run(folder / "0")
    names = list(events)
    for count in range(1, len(names) + 1):
        child = os.fork()
        if child == 0:
            events.clear()
            deadly = count
            run(folder / str(count))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (count, status)
    print(json.dumps(names))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
