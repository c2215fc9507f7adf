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
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from graftline import durable

LISTING = "files.json"
_NEWEST = re.compile(r"checkpoint-\d+")
_SHARE = re.compile(r"share-\d+-of-(\d+)")
_CHECKPOINT_FILE = re.compile(r"(share-\d+-of-\d+/)?checkpoint-\d+/[\w.-]+")
_SHARE_FILE = re.compile(r"[\w-]+/share-\d+-of-\d+\.[a-z]+")
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
        """Fetches the newest checkpoint, then sends those that appear while the context lasts."""
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
        with _held(folders, self._work) as files:
            self.keep(newest, files)
        for other in self._there():
            if _NEWEST.fullmatch(other) and other != newest:
                self._remove(f"{self._place}/{other}")
        self._sent = newest

    def fetch_shares(self) -> None:
        """Copies the shares that are kept whole here; a damaged one is left out."""
        for name in filter(_SHARE.fullmatch, self._there()):
            self._fetched(name, replaces=True)

    def _fetch(self) -> None:
        here, _ = _newest(self._work)
        for name in sorted(filter(_NEWEST.fullmatch, self._there()), reverse=True):
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
            pattern = _SHARE_FILE if replaces else _CHECKPOINT_FILE
            files = self._copied(name, temporary, pattern)
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

    def _copied(self, name: str, out: Path, pattern: re.Pattern[str]) -> list[str]:
        """Copies files; returns their names, or nothing if not all are as the listing says."""
        try:
            files = json.loads(self._objects.cat_file(f"{self._place}/{name}/{LISTING}"))
        except FileNotFoundError:
            return []  # its writer died before it was whole
        for file, sha256 in files.items():
            if not pattern.fullmatch(file):
                return []  # of another version, or somebody else's
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
    """The last checkpoint that all processes of a step wrote: its name, and each one's folder.

    Another number of processes begins anew, so the last one need not be the farthest.
    """
    shares = [each for each in work.glob("share-*") if _SHARE.fullmatch(each.name)]
    sizes = {int(each.name.rpartition("-")[2]) for each in shares}
    teams = [[each for each in shares if each.name.endswith(f"-of-{size}")] for size in sizes]
    whole = [team for team, size in zip(teams, sizes, strict=True) if len(team) == size]
    found: list[tuple[float, str, list[Path]]] = [(0.0, "", [])]
    for homes in [[work], *whole]:
        names = [{each.name for each in home.glob("checkpoint-[0-9]*")} for home in homes]
        newest = max(set.intersection(*names), default="")
        if newest:
            folders = [home / newest for home in homes]
            found.append((max(each.stat().st_mtime for each in folders), newest, folders))
    _, name, folders = max(found)
    return name, folders


@contextmanager
def _held(folders: list[Path], work: Path) -> Iterator[dict[str, Path]]:
    """The files of checkpoints by their relative names, which stay while training removes them."""
    kept = durable.temporary_sibling(work / "sent")
    try:
        files = {}
        for file in (file for folder in folders for file in sorted(folder.iterdir())):
            name = file.relative_to(work).as_posix()
            (kept / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(file, kept / name)
            except FileNotFoundError:
                raise
            except OSError:  # a file system without links
                shutil.copyfile(file, kept / name)
            files[name] = kept / name
        yield files
    finally:
        durable.remove(kept)
