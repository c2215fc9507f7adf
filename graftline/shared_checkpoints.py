"""What is finished of unfinished steps, in an object store, from which another machine goes on.

While a step is computed, each training checkpoint that appears whole in its work folder
(`checkpoint-<step>`, or `share-<i>-of-<N>/checkpoint-<step>` of all N processes that train in
shares) is copied to `<url>/.checkpoints/<kind>-<fingerprint>/checkpoint-<step>/`: its files first,
`files.json` with the sha256 of each last, then older ones go. A machine that takes the step over
fetches the newest one that is whole. Shares of features (`share-<i>-of-<N>`) are kept beside them,
one by one, until the step has joined them. All go when the step is published.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from graftline import durable

LISTING = "files.json"
_NEWEST = re.compile(r"checkpoint-\d+")
_SHARE = re.compile(r"share-\d+-of-(\d+)")
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
    """What is kept of one unfinished step.

    What goes wrong with a checkpoint costs no training: without one, a step begins anew.

    Args:
        objects: the `fsspec` file system.
        place: URL below which it lies.
        work: the step's work folder on this machine.
    """

    def __init__(self, objects: Any, place: str, work: Path) -> None:
        self._objects, self._place, self._work = objects, place.rstrip("/"), work
        self._sent: str | None = None

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Fetches what is kept, then sends checkpoints that appear while the context lasts."""
        self._guarded(self._fetch)
        try:
            with repeated(lambda: self._guarded(self._send), _SECONDS, "checkpoints"):
                yield
        except BaseException:
            self._guarded(self._send)  # what was saved just before it stopped
            raise

    def discard(self) -> None:
        """Removes it all: the step is published."""
        self._guarded(self._clear)

    def holds(self, name: str) -> bool:
        """Whether a share is kept whole."""
        return bool(self._objects.exists(f"{self._place}/{name}/{LISTING}"))

    def keep(self, name: str, files: Mapping[str, Path]) -> None:
        """Sends a share: relative name -> file."""
        hashes = {}
        for relative, file in files.items():
            self._objects.put_file(os.fspath(file), f"{self._place}/{name}/{relative}")
            hashes[relative] = durable.file_sha256(file)
        listing = json.dumps(hashes).encode()
        self._objects.pipe_file(f"{self._place}/{name}/{LISTING}", listing)

    def _send(self) -> None:
        newest, folders = _newest(self._work)
        if not folders or newest == self._sent:
            return
        found = [file for folder in folders for file in sorted(folder.iterdir())]
        self.keep(newest, {file.relative_to(self._work).as_posix(): file for file in found})
        for older in self._there():
            if _NEWEST.fullmatch(older) and older < newest:
                self._remove(f"{self._place}/{older}")
        self._sent = newest

    def _fetch(self) -> None:
        here, _ = _newest(self._work)
        there = self._there()
        for name in filter(_SHARE.fullmatch, there):
            self._fetched(name, replaces=True)
        for name in sorted(filter(_NEWEST.fullmatch, there), reverse=True):
            if name <= here:
                break
            if self._fetched(name):
                self._sent = name
                _log.info("%s: goes on from another machine's %s", self._place, name)
                break

    def _fetched(self, name: str, *, replaces: bool = False) -> bool:
        """Copies what is kept under a name; it appears here only if it is whole.

        Args:
            name: of a checkpoint, whose folders appear at once, or of a share.
            replaces: files appear one by one beside others, and replace older ones.
        """
        temporary = durable.temporary_sibling(self._work / name)
        try:
            files = self._copied(name, temporary)
            if replaces:
                for file in files:
                    (self._work / file).parent.mkdir(parents=True, exist_ok=True)
                    os.replace(temporary / file, self._work / file)
            else:
                for folder in {Path(file).parent for file in files}:
                    durable.remove(self._work / folder)
                    durable.make_folder((self._work / folder).parent)
                    durable.publish_folder(temporary / folder, self._work / folder)
        finally:
            durable.remove(temporary)
        return bool(files)

    def _copied(self, name: str, out: Path) -> list[str]:
        """Copies files; returns their names, or nothing if not all are as the listing says."""
        try:
            files = json.loads(self._objects.cat_file(f"{self._place}/{name}/{LISTING}"))
        except FileNotFoundError:
            return []  # its writer died before it was whole
        for file, sha256 in files.items():
            if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
                return []
            (out / file).parent.mkdir(parents=True, exist_ok=True)
            self._objects.get_file(f"{self._place}/{name}/{file}", os.fspath(out / file))
            if durable.file_sha256(out / file) != sha256:
                _log.warning("%s/%s/%s: damaged, and not used", self._place, name, file)
                return []
        return list(files)

    def _there(self) -> list[str]:
        """Names of what is kept, whole or not."""
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


def _newest(work: Path) -> tuple[str, list[Path]]:
    """The newest checkpoint that all processes of a step have: its name, and each one's folder."""
    shares = [each for each in work.glob("share-*") if _SHARE.fullmatch(each.name)]
    sizes = {int(each.name.rpartition("-")[2]) for each in shares}
    teams = [[each for each in shares if each.name.endswith(f"-of-{size}")] for size in sizes]
    whole = [team for team, size in zip(teams, sizes, strict=True) if len(team) == size]
    found: tuple[str, list[Path]] = ("", [])
    for homes in [[work], *whole]:
        names = [{each.name for each in home.glob("checkpoint-[0-9]*")} for home in homes]
        newest = max(set.intersection(*names), default="")
        if newest > found[0]:
            found = (newest, [home / newest for home in homes])
    return found
