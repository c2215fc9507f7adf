"""Artifacts in an object store (`s3://bucket/prefix`), which machines share.

Below `<url>/<kind>/<fingerprint>/` lie `parts/<sha256>`, one for each content, and `manifest.json`,
written last and only where there is none. Parts are called after their content, so two writers of
one fingerprint never disturb each other: whose manifest comes first, wins, and the other takes
that artifact over. A reader sees an artifact once its manifest is there, copies its parts into
a folder of this machine, and compares size and sha256 of each before the copy appears there. That
two machines do not compute the same thing at once is what claims are for (`sharing.claims`).

The copies are a `Store` of their own. Locks and temporary folders stay with them; checkpoints are
shared (`graftline.sharing.checkpoints`).
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from graftline import durable, object_urls
from graftline.errors import GraftlineError
from graftline.manifest import (
    MANIFEST,
    CorruptArtifact,
    parse_manifest,
    read_manifest,
    require_owner,
    verify_folder,
)
from graftline.object_urls import short
from graftline.sharing.checkpoints import SharedCheckpoints
from graftline.sharing.claims import SharedClaim
from graftline.sharing.copies import NOTES, Room
from graftline.store import Artifact, Store

CACHE_VARIABLE = "GRAFTLINE_STORE_CACHE"
_DEFAULT_CACHE = "~/.cache/graftline/stores"
_LARGE = ".safetensors"

_log = logging.getLogger("graftline.store")


class StoreUnreachable(GraftlineError, ConnectionError):
    """The object store does not answer; trying again may help."""


@dataclass(frozen=True)
class _Published:
    """A manifest as the object store holds it.

    Attributes:
        text: its bytes.
        files: file -> its entry of the manifest.
        made: when it was sealed, in seconds since the epoch.
    """

    text: bytes
    files: Mapping[str, Mapping[str, Any]]
    made: float


class SharedStore(Store):
    """Artifacts in an object store, with verified copies on this machine.

    The credentials and the server's address come from the environment alone (for S3:
    `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_ENDPOINT_URL`). Copies lie below
    `GRAFTLINE_STORE_CACHE`; above `GRAFTLINE_STORE_CACHE_GB` (10**9 bytes) those that nobody
    uses go, the longest unused first.

    Args:
        url: of the root of all artifacts.
        verify: as of `Store`.

    Raises:
        GraftlineError: The URL cannot be a store, or holds credentials.
    """

    def __init__(self, url: str, verify: Literal["quick", "full"] = "full") -> None:
        self.url = url.rstrip("/")
        protocol, _, rest = self.url.partition("://")
        if protocol not in object_urls.PROTOCOLS:
            raise GraftlineError(
                f"{url}: the artifact store cannot be there; name a local folder, or a URL with"
                f" {', '.join(object_urls.PROTOCOLS)}."
            )
        if object_urls.holds_credentials(self.url):
            raise GraftlineError(
                f"{protocol}://...: the store's URL holds credentials; give them by the"
                " environment, where no log and no recipe shows them."
            )
        name = re.sub(r"[^A-Za-z0-9]+", "-", rest)[:40].strip("-")
        unique = hashlib.sha256(self.url.encode()).hexdigest()[:12]
        cache = Path(os.environ.get(CACHE_VARIABLE) or _DEFAULT_CACHE).expanduser()
        super().__init__(cache.absolute() / f"{protocol}-{name}-{unique}", verify)
        self._copies, self._room = Store(self.root, verify), Room(self.root)

    @cached_property
    def _objects(self) -> Any:
        """The `fsspec` file system, opened when it is first wanted."""
        return object_urls.opened(self.url)[0]

    def location(self, kind: str, fingerprint: str) -> str:
        """The URL below which an artifact's objects lie or would lie."""
        self.folder(kind, fingerprint)
        return f"{self.url}/{kind}/{fingerprint}"

    def holds(self, kind: str, fingerprint: str) -> bool:
        """Whether an artifact is published with all of its parts; nothing is copied.

        Raises:
            CorruptArtifact: If its manifest is damaged, or a part is missing or cut off.
        """
        return self._published(kind, fingerprint) is not None

    def find(self, kind: str, fingerprint: str) -> Artifact | None:
        """Return a published artifact's verified copy on this machine, or None if there is none.

        As long as somebody keeps the `Artifact`, its copy stays.

        Raises:
            CorruptArtifact: If what is published does not match its manifest.
            StoreUnreachable: If the object store does not answer.
        """
        published = self._published(kind, fingerprint)
        if published is None:
            return None
        use = self._room.use(kind, fingerprint)
        try:
            if not self._is_here(kind, fingerprint, published):
                with self.lock(kind, fingerprint):
                    if not self._is_here(kind, fingerprint, published):
                        self._fetch(kind, fingerprint, published)
            artifact = Artifact(kind, fingerprint, self.folder(kind, fingerprint))
        except BaseException:
            os.close(use)
            raise
        weakref.finalize(artifact, os.close, use)
        return artifact

    def find_files(self, kind: str, fingerprint: str, prefix: str) -> Artifact | None:
        """As `find`, but only files whose names begin so are copied if none are here yet."""
        if self.folder(kind, fingerprint).exists():
            return self.find(kind, fingerprint)
        folder = self._some(kind, fingerprint, prefix, lambda name: name.startswith(prefix))
        return Artifact(kind, fingerprint, folder) if folder else None

    def local(self, kind: str, fingerprint: str) -> Path:
        """The folder of an artifact's copy, which is fetched if it is not here yet."""
        found = self.find(kind, fingerprint)
        return found.folder if found else self.folder(kind, fingerprint)

    def notes(self, kind: str, fingerprint: str) -> Path:
        """A folder with an artifact's small files (everything but tensors), verified."""
        folder = self.folder(kind, fingerprint)
        if folder.exists():
            return folder
        return self._some(kind, fingerprint, "", lambda name: not name.endswith(_LARGE)) or folder

    def _some(
        self, kind: str, fingerprint: str, what: str, wanted: Callable[[str], bool]
    ) -> Path | None:
        """A folder with some files of an artifact, verified; None if it is not published."""
        published = self._published(kind, fingerprint)
        if published is None:
            return None
        some = self.root / NOTES / f"{kind}-{fingerprint}{what}"
        names = [name for name in published.files if wanted(name)]
        with self.lock(kind, fingerprint):
            if not _is_whole(some, published, names):
                durable.discard(some)
                self._copy(self.location(kind, fingerprint), published, names, some)
            os.utime(some)
        return some

    @contextmanager
    def share(self, kind: str, fingerprint: str, name: str) -> Iterator[bool]:
        """As of `Store`; a share that is done is kept beside the step's checkpoints."""
        kept, work = self._checkpoints(kind, fingerprint), self._work_path(kind, fingerprint)

        def is_done() -> bool:
            with self._reaching():
                return kept.holds(name) or self.holds(kind, fingerprint)

        claim = SharedClaim(self._objects, f"{self.url}/.claims/{kind}.{name}-{fingerprint}")
        with super().share(kind, fingerprint, name), claim.held(is_done) as ours:
            yield ours
            if ours:
                files = sorted(work.glob(f"*/{name}.*"))
                with self._reaching():
                    kept.keep(name, {file.relative_to(work).as_posix(): file for file in files})
                for file in files:  # who joins the shares fetches them
                    file.unlink()

    def sweep(self) -> list[Path]:
        """Remove what dead writers of this machine left, and copies above the limit."""
        return super().sweep() + self._room.make()

    def _build(
        self, kind: str, fingerprint: str, step: dict[str, Any], build: Callable[[Path], None]
    ) -> Artifact:
        """Build a copy here, unless another machine does, and publish it."""
        claim = SharedClaim(self._objects, f"{self.url}/.claims/{kind}-{fingerprint}")
        with claim.held(lambda: self.holds(kind, fingerprint)) as ours:
            if ours:
                self._build_here(kind, fingerprint, step, build)
        found = self.find(kind, fingerprint)
        if found is None:
            place = self.location(kind, fingerprint)
            raise CorruptArtifact(place, "vanished while it was published", place)
        self._room.make()
        return found

    def _build_here(
        self, kind: str, fingerprint: str, step: dict[str, Any], build: Callable[[Path], None]
    ) -> None:
        """Build a copy, unless a whole one is here (its writer died later), and publish that."""
        try:
            built = self._copies.find(kind, fingerprint)
        except CorruptArtifact:
            durable.discard(self.folder(kind, fingerprint))
            built = None
        checkpoints = self._checkpoints(kind, fingerprint)
        if built is None:
            with self._reaching():
                checkpoints.fetch_shares()
            with checkpoints.shared():
                self._copies._build(kind, fingerprint, step, build)
        self._send(kind, fingerprint)
        checkpoints.discard()

    def _checkpoints(self, kind: str, fingerprint: str) -> SharedCheckpoints:
        place = f"{self.url}/.checkpoints/{kind}-{fingerprint}"
        return SharedCheckpoints(self._objects, place, self._work_path(kind, fingerprint))

    def _send(self, kind: str, fingerprint: str) -> None:
        """Upload the parts of a copy that are not there, then its manifest if there is none."""
        folder, place = self.folder(kind, fingerprint), self.location(kind, fingerprint)
        with self._reaching():
            there = self._sizes(place)
            for name, entry in read_manifest(folder)["files"].items():
                part = f"parts/{entry['sha256']}"
                if there.get(part) != entry["size"]:
                    self._objects.put_file(os.fspath(folder / name), f"{place}/{part}")
                    there[part] = entry["size"]
            try:
                text = (folder / MANIFEST).read_bytes()
                self._objects.pipe_file(f"{place}/{MANIFEST}", text, mode="create")
            except FileExistsError:
                _log.info("%s: another machine published it first", place)

    def _published(self, kind: str, fingerprint: str) -> _Published | None:
        """Read and check a manifest and the sizes of its parts.

        Raises:
            CorruptArtifact: Names the first object that is damaged.
        """
        place = self.location(kind, fingerprint)
        with self._reaching():
            sizes = self._sizes(place)
            if MANIFEST not in sizes:
                return None
            text = self._objects.cat_file(f"{place}/{MANIFEST}")
        manifest = parse_manifest(text, f"{place}/{MANIFEST}", place)
        require_owner(manifest, kind, fingerprint, f"{place}/{MANIFEST}", place)
        for name, entry in manifest["files"].items():
            part = f"parts/{entry['sha256']}"
            if sizes.get(part) != entry["size"]:
                found = f"has {sizes[part]} bytes" if part in sizes else "is missing"
                wrong = f"{found}; it is {name}, of {entry['size']} bytes"
                raise CorruptArtifact(f"{place}/{part}", wrong, place)
        made = datetime.fromisoformat(manifest["created"]).timestamp()
        return _Published(text, manifest["files"], made)

    def _sizes(self, place: str) -> dict[str, int]:
        """Every object below a place by its relative name, and its bytes."""
        start = self._objects._strip_protocol(place).strip("/") + "/"
        found = self._objects.find(place, detail=True)
        return {
            path.strip("/").removeprefix(start): int(entry["size"]) for path, entry in found.items()
        }

    def _is_here(self, kind: str, fingerprint: str, published: _Published) -> bool:
        """Whether this very artifact's copy is here and whole; a damaged copy goes."""
        folder = self.folder(kind, fingerprint)
        try:
            if (folder / MANIFEST).read_bytes() != published.text:
                return False
            verify_folder(folder, kind, fingerprint, full=self.verify == "full")
        except CorruptArtifact as error:
            _log.warning("%s: its copy on this machine is damaged: %s", folder, error)
            return False
        except OSError:
            return False
        return True

    def _fetch(self, kind: str, fingerprint: str, published: _Published) -> None:
        folder = self.folder(kind, fingerprint)
        durable.discard(folder)
        self._copy(self.location(kind, fingerprint), published, list(published.files), folder)
        self._room.make()

    def _copy(self, place: str, published: _Published, names: list[str], target: Path) -> None:
        """Copy files of an artifact; they appear together, after each was compared."""
        with durable.building(target) as temporary:
            for name in names:
                file, sha256 = temporary / name, published.files[name]["sha256"]
                file.parent.mkdir(parents=True, exist_ok=True)
                with self._reaching():
                    self._objects.get_file(f"{place}/parts/{sha256}", os.fspath(file))
                if durable.file_sha256(file) != sha256:
                    wrong = f"its content differs from its name (sha256); it is {name}"
                    raise CorruptArtifact(f"{place}/parts/{sha256}", wrong, place)
                os.utime(file, (published.made, published.made))
            (temporary / MANIFEST).write_bytes(published.text)
            durable.publish_folder(temporary, target)

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        """Name the store where it cannot be reached or used."""
        try:
            with durable.naming_disk_faults(self.root):
                yield
        except (GraftlineError, FileExistsError):
            raise
        except PermissionError as error:
            raise GraftlineError(
                f"{self.url}: access is denied ({short(error)}). Check the credentials in the"
                " environment and their rights to list, read and write there."
            ) from error
        except FileNotFoundError as error:
            raise GraftlineError(
                f"{self.url}: {short(error)} is not there. Make the bucket first; if it is there,"
                " somebody deletes below it: run again."
            ) from error
        except Exception as error:  # `fsspec`'s file systems pass their clients' own errors on
            raise StoreUnreachable(
                f"{self.url}: does not answer as it should ({type(error).__name__}:"
                f" {short(error)}). Finished steps are kept; run again when it does."
            ) from error


def _is_whole(folder: Path, published: _Published, names: list[str]) -> bool:
    """Whether some files of just this artifact are in a folder, whole."""
    try:
        return (folder / MANIFEST).read_bytes() == published.text and all(
            durable.file_sha256(folder / name) == published.files[name]["sha256"] for name in names
        )
    except OSError:
        return False
