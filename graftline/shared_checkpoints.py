"""Checkpoints of unfinished steps in an object store, from which another machine goes on.

While a step is computed, each checkpoint that appears in its work folder (`checkpoint-<step>`, a
folder that appears whole) is copied to `<url>/.checkpoints/<kind>-<fingerprint>/<name>/`: its files
first, `files.json` with the sha256 of each last, then older ones go. A machine that takes the step
over fetches the newest one that is whole. They go when the step is published.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from graftline import durable

LISTING = "files.json"
_PATTERN = "checkpoint-[0-9]*"
_SECONDS = 2.0
"""Between two looks at the work folder."""

_log = logging.getLogger("graftline.store")


@contextmanager
def repeated(action: Callable[[], object], seconds: float, name: str) -> Iterator[None]:
    """Does something every few seconds, from a thread of its own, while the context lasts."""
    over = threading.Event()

    def work() -> None:
        while not over.wait(seconds):
            action()

    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class SharedCheckpoints:
    """The checkpoints of one step.

    What goes wrong here costs no training: without a checkpoint, a step begins anew.

    Args:
        objects: the `fsspec` file system.
        place: URL below which the step's checkpoints lie.
        work: the step's work folder on this machine.
    """

    def __init__(self, objects: Any, place: str, work: Path) -> None:
        self._objects, self._place, self._work = objects, place.rstrip("/"), work
        self._sent: str | None = None

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Fetches the newest checkpoint, then sends those that appear while the context lasts."""
        self._guarded(self._fetch)
        try:
            with repeated(lambda: self._guarded(self._send), _SECONDS, "checkpoints"):
                yield
        except BaseException:
            self._guarded(self._send)  # what was saved just before it stopped
            raise

    def discard(self) -> None:
        """Removes them all: the step is published."""
        self._guarded(self._clear)

    def _send(self) -> None:
        newest = max(self._work.glob(_PATTERN), default=None)
        if newest is None or newest.name == self._sent:
            return
        files = {}
        for file in sorted(newest.iterdir()):
            self._objects.put_file(os.fspath(file), f"{self._place}/{newest.name}/{file.name}")
            files[file.name] = durable.file_sha256(file)
        self._objects.pipe_file(
            f"{self._place}/{newest.name}/{LISTING}", json.dumps(files).encode()
        )
        for older in self._there():
            if older < newest.name:
                self._remove(f"{self._place}/{older}")
        self._sent = newest.name

    def _fetch(self) -> None:
        here = max((each.name for each in self._work.glob(_PATTERN)), default="")
        for name in sorted(self._there(), reverse=True):
            if name <= here:
                break
            target = self._work / name
            temporary = durable.temporary_sibling(target)
            try:
                if self._copied(name, temporary):
                    durable.publish_folder(temporary, target)
                    self._sent = name
                    _log.info("%s: goes on from another machine's %s", self._place, name)
                    break
            finally:
                durable.remove(temporary)

    def _copied(self, name: str, out: Path) -> bool:
        """Copies a checkpoint; says whether all of its files are what its listing says."""
        try:
            files = json.loads(self._objects.cat_file(f"{self._place}/{name}/{LISTING}"))
        except FileNotFoundError:
            return False  # its writer died before it was whole
        out.mkdir(parents=True)
        for file, sha256 in files.items():
            if Path(file).name != file:
                return False
            self._objects.get_file(f"{self._place}/{name}/{file}", os.fspath(out / file))
            if durable.file_sha256(out / file) != sha256:
                _log.warning("%s/%s/%s: damaged, and not used", self._place, name, file)
                return False
        return True

    def _there(self) -> list[str]:
        """Names of the step's checkpoints, whole or not."""
        start = self._objects._strip_protocol(self._place).strip("/") + "/"
        found = self._objects.find(self._place)
        return sorted({path.strip("/").removeprefix(start).split("/")[0] for path in found})

    def _clear(self) -> None:
        for name in self._there():
            self._remove(f"{self._place}/{name}")

    def _remove(self, place: str) -> None:
        """Removes what is there; for what is not, `fsspec` raises errors that outlive the call."""
        self._objects.rm(place, recursive=True)

    def _guarded(self, action: Any) -> None:
        """Does what can be done; the step itself does not depend on it."""
        try:
            action()
        except Exception as error:  # `fsspec`'s file systems pass their clients' own errors on
            _log.warning("%s: checkpoints are not shared (%s)", self._place, error)
