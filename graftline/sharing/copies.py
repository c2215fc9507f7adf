"""How much room this machine's copies of a shared store take, and which of them go."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from graftline import durable
from graftline.errors import GraftlineError

LIMIT_VARIABLE = "GRAFTLINE_STORE_CACHE_GB"
_DEFAULT_GIGABYTES = 100.0
_KEPT_SECONDS = 3600.0
NOTES = ".notes"
"""Where some files of artifacts lie, beside whole copies."""


class Room:
    """The room for copies below a folder `<root>/<kind>/<fingerprint>`.

    Args:
        root: of the copies; `.used` beside the kinds says when each was used last.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def use(self, kind: str, fingerprint: str) -> int:
        """Say that a copy is in use, until the descriptor returned is closed."""
        marks = self._root / ".used"
        with durable.naming_disk_faults(self._root):
            durable.make_folder(marks)
            mark = marks / f"{kind}-{fingerprint}"
            descriptor = os.open(mark, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            os.utime(descriptor)
        return descriptor

    def make(self) -> list[Path]:
        """Remove the longest unused copies above the limit; return what is gone."""
        limit = _limit_bytes()
        gone: list[Path] = []
        marks = {mark: self._copy_of(mark) for mark in (self._root / ".used").glob("[!.]*-*")}
        # Some files of an artifact have no mark of their own: who reads them touched their folder.
        marks |= {some: some for some in (self._root / NOTES).glob("[!.]*-*")}
        copies = sorted((_changed(mark), mark) for mark in marks)
        total = sum(_bytes_below(folder) for folder in marks.values())
        for used, mark in copies:
            if total <= limit:
                break
            folder = marks[mark]
            if time.time() - used > _KEPT_SECONDS and folder.exists():
                with _unused(mark) if mark != folder else nullcontext(True) as free:
                    if free:
                        total -= _bytes_below(folder)
                        durable.discard(folder)
                        gone.append(folder)
        return gone

    def _copy_of(self, mark: Path) -> Path:
        kind, _, fingerprint = mark.name.rpartition("-")
        return self._root / kind / fingerprint


@contextmanager
def _unused(mark: Path) -> Iterator[bool]:
    """Say whether nobody uses a copy; nobody starts to while the context lasts."""
    with mark.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True


def _limit_bytes() -> float:
    text = os.environ.get(LIMIT_VARIABLE) or str(_DEFAULT_GIGABYTES)
    try:
        return float(text) * 1e9
    except ValueError as error:
        raise GraftlineError(f"{LIMIT_VARIABLE}={text!r}: give a number of gigabytes") from error


def _changed(path: Path) -> float:
    """When a path was changed; long ago where it is gone."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _bytes_below(folder: Path) -> int:
    """Bytes of a folder's files; another process may remove them meanwhile."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += Path(place, name).stat().st_size
    return total
