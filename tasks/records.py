"""Which runs are going on, so that the ones that were killed do not stay RUNNING for ever.

A run writes `<store>/.runs/<id>.json` and holds the lock beside it. The kernel drops the lock
when the process dies; the next run finds a record whose lock is free and closes what it names.
"""

from __future__ import annotations

import json
import os
import socket
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from graftline.durable import atomic_write_text
from graftline.stores import machine_folder


class RunRecord:
    """The record of this process's run, while it lasts.

    Attributes:
        content: what is known of the run so far.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.content: dict[str, str | int] = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "project": str(Path.cwd()),  # whose MLflow database and Prefect know the run
        }

    def note(self, **content: str) -> None:
        """Adds to the record, e.g. `mlflow_run=...`; durable on return."""
        self.content.update(content)
        atomic_write_text(self._path, json.dumps(self.content))

    def remove(self) -> None:
        """Forgets the run, which has ended."""
        self._path.unlink(missing_ok=True)
        self._path.with_suffix(".lock").unlink(missing_ok=True)


@contextmanager
def recorded_run(store: Path | str) -> Iterator[RunRecord]:
    """Keeps a record of a run while the context lasts, and removes it at its end."""
    folder = machine_folder(store) / ".runs"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{uuid.uuid4().hex}.json"
    lock = FileLock(path.with_suffix(".lock"))
    with lock:
        record = RunRecord(path)
        record.note()
        try:
            yield record
        finally:
            record.remove()


def dead_runs(store: Path | str) -> Iterator[Mapping[str, str | int]]:
    """Yields what dead runs recorded, and forgets each after its caller has dealt with it.

    Of this project alone: another one that shares the store closes its own.
    """
    for path in sorted((machine_folder(store) / ".runs").glob("*.json")):
        lock = FileLock(path.with_suffix(".lock"))
        with suppress(Timeout), lock.acquire(blocking=False):
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                content = {}
            if content.get("project", str(Path.cwd())) != str(Path.cwd()):
                continue
            yield content
            path.unlink(missing_ok=True)
            path.with_suffix(".lock").unlink(missing_ok=True)
