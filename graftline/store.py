"""Artifacts: build aside, seal with a manifest, publish with one rename, verify before use.

A published artifact is a folder `<root>/<kind>/<fingerprint>/` whose `manifest.json` was written
last. It appears with a single rename, so a reader sees all of it or nothing. Beside the kinds lie
`<root>/.work/` (resumable state of unfinished steps) and `<root>/.locks/` (one writer a step).
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NoReturn

from filelock import FileLock, Timeout

from graftline import durable
from graftline.durable import naming_disk_faults
from graftline.errors import GraftlineError
from graftline.manifest import (
    FORMAT,
    CorruptArtifact,
    plain_data,
    read_manifest,
    seal,
    verify_folder,
)

_KIND = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_FINGERPRINT = re.compile(r"[A-Za-z0-9_]{1,128}")  # no hyphen: `<kind>-<fingerprint>` stays unique

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Artifact:
    """A published, verified folder."""

    kind: str
    fingerprint: str
    folder: Path

    def manifest(self) -> dict[str, Any]:
        """Read the manifest: format, kind, fingerprint, files, parents, parameters, code, created.

        Raises:
            CorruptArtifact: If it is missing, unreadable or was changed.
        """
        return read_manifest(self.folder)


class Store:
    """Artifacts below one local folder. Making a `Store` touches nothing on the disk.

    Args:
        root: The folder of all artifacts.
        verify: `full` compares sha256 of every file (remembered per process while the files'
            time stamps, sizes and inodes stay); `quick` compares names, sizes and tensor headers.

    Raises:
        GraftlineError: If `root` is a URL: only local folders can be locked and renamed.
    """

    def __init__(self, root: Path | str, verify: Literal["quick", "full"] = "full") -> None:
        if "://" in str(root):
            raise GraftlineError(f"{root}: is a URL; `graftline.stores.open_store` opens those.")
        self.root = Path(root)
        self.verify = verify

    def folder(self, kind: str, fingerprint: str) -> Path:
        """Say where an artifact lies or would lie.

        Raises:
            GraftlineError: If either name cannot be part of a path.
        """
        if not _KIND.fullmatch(kind) or not _FINGERPRINT.fullmatch(fingerprint):
            raise GraftlineError(
                f"kind {kind!r}, fingerprint {fingerprint!r}: use letters, digits and underscores"
                " (in a kind also dots and hyphens, not first)."
            )
        return self.root / kind / fingerprint

    def location(self, kind: str, fingerprint: str) -> str:
        """Say where an artifact lies or would lie for all who use the store."""
        return os.path.abspath(self.folder(kind, fingerprint))

    def holds(self, kind: str, fingerprint: str) -> bool:
        """Whether an artifact is published; verified as far as that needs no copying.

        Raises:
            CorruptArtifact: If it is there but does not match its manifest.
        """
        return self.find(kind, fingerprint) is not None

    def local(self, kind: str, fingerprint: str) -> Path:
        """A folder of this machine with an artifact's files; it is missing if they are."""
        return self.folder(kind, fingerprint)

    def notes(self, kind: str, fingerprint: str) -> Path:
        """A folder of this machine with an artifact's small files, if it is published.

        For tables, histories and durations, which people want to see without the weights.
        """
        return self.folder(kind, fingerprint)

    def find(self, kind: str, fingerprint: str) -> Artifact | None:
        """Return a published artifact after verifying it, or None if there is none.

        Raises:
            CorruptArtifact: If the folder is there but does not match its manifest.
            GraftlineError: If this user may not read it.
        """
        folder = self.folder(kind, fingerprint)
        if not os.path.lexists(folder):
            return None
        try:
            verify_folder(folder, kind, fingerprint, full=self.verify == "full")
        except OSError as error:
            path = Path(os.fsdecode(error.filename)) if error.filename else folder
            if error.errno in durable.DENIED:
                remedy = "Make it readable for this user and run again."
                raise GraftlineError(f"{path}: cannot be read. {remedy}") from error
            raise CorruptArtifact(path, f"cannot be read ({error.strerror})", folder) from error
        return Artifact(kind, fingerprint, folder)

    def find_files(self, kind: str, fingerprint: str, prefix: str) -> Artifact | None:
        """As `find`, for who needs only the files whose names begin with a prefix.

        Other machines' artifacts are copied so far only, and verified so far.
        """
        return self.find(kind, fingerprint)

    def publish(
        self,
        kind: str,
        fingerprint: str,
        *,
        parameters: Mapping[str, Any],
        parents: Mapping[str, str],
        code: str,
        build: Callable[[Path], None],
        on_wait: Callable[[str], None] | None = None,
    ) -> Artifact:
        """Return the artifact, building it first if it is absent; then drop its work folder.

        Args:
            kind: Kind of step, e.g. `merge`.
            fingerprint: The step's fingerprint, known before it runs.
            parameters: The step's own parameters, plain data.
            parents: Fingerprint of each input by name.
            code: Digest of the step's code.
            build: Fills the empty folder it is given. Its exceptions pass through, after the
                folder was removed; a full disk or read-only store arrives as `StoreUnwritable`.
            on_wait: Called once with a text naming the holder if another writer is at work.

        Raises:
            CorruptArtifact: If the artifact exists but does not match its manifest.
            StoreUnwritable: If the disk is full or the folder is read-only.
            GraftlineError: If `parameters` is not plain data or `build` left an unusable file.
        """
        step = {
            "format": FORMAT,
            "kind": kind,
            "fingerprint": fingerprint,
            "parameters": plain_data(parameters, "parameters"),
            "parents": plain_data(parents, "parents"),
            "code": code,
        }
        work = self._work_path(kind, fingerprint)
        found = self.find(kind, fingerprint)
        if found is not None and not work.exists():
            return found
        with self.lock(kind, fingerprint, on_wait=on_wait):
            found = self.find(kind, fingerprint) or self._build(kind, fingerprint, step, build)
            durable.discard(work)
        return found

    def work_folder(self, kind: str, fingerprint: str) -> Path:
        """Return (made if need be) the folder for a step's resumable state, e.g. checkpoints.

        Use it while holding `lock`. It outlives a crash and goes with the step's `publish`.

        Raises:
            StoreUnwritable: If the disk is full or the folder is read-only.
        """
        work = self._work_path(kind, fingerprint)
        with naming_disk_faults(work):
            durable.make_folder(work)
        return work

    @contextmanager
    def share(self, kind: str, fingerprint: str, name: str) -> Iterator[bool]:
        """Carry out a share of a step, apart from machines that carry out others.

        What is done of it goes below `work_folder`, in files called `<any folder>/<name>.*`;
        whoever publishes the step finds them there.

        Args:
            kind: Kind of step.
            fingerprint: The step's fingerprint.
            name: Of the share.

        Yields:
            Whether it is still to be done.
        """
        with self.lock(f"{kind}.{name}", fingerprint):
            yield True

    @contextmanager
    def lock(
        self,
        kind: str,
        fingerprint: str,
        *,
        on_wait: Callable[[str], None] | None = None,
        poll_seconds: float = 0.1,
    ) -> Iterator[None]:
        """Be the only writer of one artifact, over processes and threads; re-entrant in a thread.

        The kernel's lock dies with its holder, so that a dead holder's place is taken at once.

        Args:
            kind: Kind of step.
            fingerprint: The step's fingerprint.
            on_wait: Called once, with pid, host and start of the holder, if there is one.
            poll_seconds: How often a waiter tries again.

        Raises:
            StoreUnwritable: If the lock file cannot be made.
        """
        self.folder(kind, fingerprint)
        locks = self.root / ".locks"
        holder = locks / f"{kind}-{fingerprint}.holder"
        with naming_disk_faults(locks):
            durable.make_folder(locks)
            lock = FileLock(holder.with_name(f"{kind}-{fingerprint}.lock"), is_singleton=True)
            try:
                lock.acquire(blocking=False)
                waiting = False
            except Timeout:
                waiting = True
        if waiting:
            text = _holder_text(holder)
            _log.info("waiting for %s/%s, held by %s", kind, fingerprint, text)
            if on_wait is not None:
                on_wait(text)
            lock.acquire(poll_interval=poll_seconds)
        try:
            if lock.lock_counter == 1:
                with naming_disk_faults(locks):
                    _write_holder(holder)
            yield
        finally:
            if lock.lock_counter == 1:
                with suppress(OSError):
                    holder.unlink()
            lock.release()

    def sweep(self) -> list[Path]:
        """Remove what dead writers left; return the paths that are gone.

        That is temporary siblings of dead processes of this host, and work folders whose artifact
        is published and whole, unless a writer holds its lock. Nothing else is touched: not what
        living processes or other hosts are filling, no work folder of an unfinished step.
        """
        swept = []
        for pattern in ("*/.tmp-*", ".work/*/.tmp-*"):
            for path in sorted(self.root.glob(pattern)):
                if durable.left_behind(path):
                    # A container of the same name has other process ids: its writer holds the lock.
                    with suppress(GraftlineError), self.lock(*_built(path), on_wait=_give_up):
                        durable.remove(path)
                        swept.append(path)
        for work in sorted((self.root / ".work").glob("[!.]*-*")):
            kind, _, fingerprint = work.name.rpartition("-")
            with suppress(GraftlineError):  # a foreign name, a corrupt artifact, a lock in use
                if self.holds(kind, fingerprint):
                    with self.lock(kind, fingerprint, on_wait=_give_up):
                        durable.discard(work)
                    swept.append(work)
        return [path for path in swept if not os.path.lexists(path)]

    def _work_path(self, kind: str, fingerprint: str) -> Path:
        self.folder(kind, fingerprint)
        return self.root / ".work" / f"{kind}-{fingerprint}"

    def _build(
        self, kind: str, fingerprint: str, step: dict[str, Any], build: Callable[[Path], None]
    ) -> Artifact:
        """Build in a temporary sibling, seal it and rename it; the caller holds the lock."""
        target = self.folder(kind, fingerprint)
        with durable.building(target) as temporary:
            build(temporary)
            seal(temporary, step)
            try:
                durable.rename_new(temporary, target)
            except FileExistsError:  # a writer that does not see our lock was faster
                if not target.exists():
                    raise
        found = self.find(kind, fingerprint)
        if found is None:
            raise CorruptArtifact(target, "vanished while it was published", target)
        return found


def _built(temporary: Path) -> tuple[str, str]:
    """Kind and fingerprint of what a temporary sibling is a part of: an artifact, or its work."""
    name = temporary.name.removeprefix(".tmp-").rsplit("-", 2)[0]
    if temporary.parent.parent.name == ".work":
        name = temporary.parent.name
    elif temporary.parent.name != ".work":
        return temporary.parent.name, name
    kind, _, fingerprint = name.rpartition("-")
    return kind, fingerprint


def _give_up(holder: str) -> NoReturn:
    """Refuse to wait for a lock."""
    raise GraftlineError(f"held by {holder}")


def _write_holder(path: Path) -> None:
    """Say who holds a lock; a file that is still there means that the last holder died."""
    if path.exists():
        _log.warning("%s: took the lock over from a dead holder", path.with_suffix(".lock"))
    since = datetime.now(UTC).isoformat(timespec="seconds")
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
    path.write_text(json.dumps(holder))


def _holder_text(path: Path) -> str:
    """Read who holds a lock, waiting a moment for one who has just taken it."""
    text = "a process that has not named itself yet"
    for _ in range(10):
        with suppress(OSError, ValueError, KeyError, TypeError):
            holder = json.loads(path.read_text())
            text = "process {pid} on {host}, since {since}".format_map(holder)
            if holder["host"] != socket.gethostname() or durable.process_runs(holder["pid"]):
                break
        time.sleep(0.02)
    return text
