"""Manifests: what a published folder holds and where it came from, sealed and verified."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from graftline.durable import (
    file_sha256,
    fsync_folder,
    fsync_tree,
    raise_error,
    write_synced,
)
from graftline.errors import GraftlineError
from graftline.weight_files import read_header

MANIFEST = "manifest.json"
FORMAT = 1
_NOT_DIGESTED = frozenset({"created", "digest"})
_RECENT_NANOSECONDS = 50_000_000  # a younger change may share its time stamp with a later one

_verified: dict[str, tuple[tuple[str | int, ...], ...]] = {}  # folder -> its files when last hashed


class CorruptArtifact(GraftlineError):
    """A published folder does not match its manifest."""

    def __init__(self, path: Path | str, wrong: str, folder: Path | str) -> None:
        remedy = f"Delete the folder {folder} and run again to rebuild it."
        super().__init__(f"{path}: {wrong}. {remedy}")
        self.path = path
        self.folder = folder


def canonical_json(value: Any, where: str = "value") -> str:
    """Write plain data as JSON that depends on its content only, not on the order of its keys.

    Args:
        value: None, bool, int, finite float, str, and lists, tuples and mappings of these.
        where: How messages call the value.

    Raises:
        GraftlineError: If a part is of another type, not finite, or has a key that is no string.
    """
    return json.dumps(
        plain_data(value, where), sort_keys=True, separators=(",", ":"), allow_nan=False
    )


def fingerprint_of(
    kind: str, *, parameters: Mapping[str, Any], parents: Mapping[str, str], code: str
) -> str:
    """Name a step by its content: sha256 over kind, parameters, parents' fingerprints and code.

    Raises:
        GraftlineError: If `parameters` holds something other than plain data.
    """
    step = {"kind": kind, "parameters": parameters, "parents": parents, "code": code}
    return hashlib.sha256(canonical_json(step, kind).encode()).hexdigest()


def plain_data(value: Any, where: str) -> Any:
    """Copy plain data with tuples as lists; refuse what JSON would drop or change."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float) and value - value == 0:  # finite
        return value
    if isinstance(value, list | tuple):
        return [plain_data(part, f"{where}[{index}]") for index, part in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: plain_data(part, f"{where}.{key}") for key, part in value.items()}
    raise GraftlineError(
        f"{where}: {value!r} ({type(value).__name__}) cannot go into a manifest. Use None, bool,"
        " int, finite float, str, and lists or string-keyed mappings of these."
    )


def seal(folder: Path, step: Mapping[str, Any]) -> None:
    """Force all files to the disk, then write the manifest, and force that too.

    Tensors become readable for whom the folder is (it follows the umask): safetensors makes its
    files readable for their owner only.

    Raises:
        GraftlineError: If a file is not a regular one, is damaged, or is called like the manifest.
    """
    readable = folder.stat().st_mode & 0o444
    present = _files(folder)
    for name, status in present.items():
        if name == MANIFEST or not stat.S_ISREG(status.st_mode):
            rule = f"a step may write regular files only, and no {MANIFEST}."
            raise GraftlineError(f"{folder / name}: {rule}")
        if name.endswith(".safetensors") and readable & ~status.st_mode:
            os.chmod(folder / name, stat.S_IMODE(status.st_mode) | readable)
    fsync_tree(folder)
    files: dict[str, dict[str, Any]] = {}
    for name, status in present.items():
        path = folder / name
        files[name] = {"sha256": file_sha256(path), "size": status.st_size}
        if path.suffix == ".safetensors":
            try:
                files[name]["tensors"] = _tensors(path)
            except ValueError as error:
                raise GraftlineError(f"{path}: {error}; the step wrote it wrongly.") from error
    manifest = {**step, "files": files}
    manifest["digest"] = _digest(manifest)
    manifest["created"] = datetime.now(UTC).isoformat(timespec="seconds")
    text = json.dumps(manifest, sort_keys=True, indent=1, allow_nan=False) + "\n"
    write_synced(folder / MANIFEST, text.encode())
    fsync_folder(folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a folder's manifest.

    Raises:
        CorruptArtifact: If it is missing, unreadable or was changed.
    """
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CorruptArtifact(path, "is missing", folder) from error
    return parse_manifest(content, path, folder)


def parse_manifest(content: bytes, path: Path | str, folder: Path | str) -> dict[str, Any]:
    """Check the bytes of a manifest.

    Args:
        content: the bytes.
        path: where they were read.
        folder: the artifact that they seal.

    Raises:
        CorruptArtifact: If they are cut off, of another format, or were changed.
    """
    try:
        manifest = json.loads(content)
    except ValueError as error:
        raise CorruptArtifact(path, "is cut off or damaged (not JSON)", folder) from error
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if version != FORMAT:
        raise CorruptArtifact(path, f"has format {version!r}, this program {FORMAT}", folder)
    try:
        intact = manifest.get("digest") == _digest(manifest)
    except GraftlineError:  # NaN, for one, is no JSON, but Python reads it
        intact = False
    if not intact:
        raise CorruptArtifact(path, "was changed after publishing (digest differs)", folder)
    return dict(manifest)


def require_owner(
    manifest: Mapping[str, Any],
    kind: str,
    fingerprint: str,
    path: Path | str,
    folder: Path | str,
) -> None:
    """Compare whom a manifest belongs to with whom it was looked up for.

    Raises:
        CorruptArtifact: It belongs to another artifact.
    """
    owner = f"{manifest['kind']}/{manifest['fingerprint']}"
    if owner != f"{kind}/{fingerprint}":
        raise CorruptArtifact(path, f"belongs to {owner}", folder)


def verify_folder(folder: Path, kind: str, fingerprint: str, *, full: bool) -> None:
    """Compare a folder with its manifest.

    Raises:
        CorruptArtifact: Names the first file that differs, and how.
    """
    manifest = read_manifest(folder)
    require_owner(manifest, kind, fingerprint, folder / MANIFEST, folder)
    present, expected = _files(folder), manifest["files"]
    for name in sorted(present.keys() | expected.keys() | {MANIFEST}):
        wrong = None
        if name not in present:
            wrong = "is missing"
        elif name not in expected and name != MANIFEST:
            wrong = "does not belong here (not in the manifest)"
        elif not stat.S_ISREG(present[name].st_mode):
            wrong = "is not a regular file"
        elif name != MANIFEST and present[name].st_size != expected[name]["size"]:
            sizes = present[name].st_size, expected[name]["size"]
            wrong = "has {} bytes, the manifest says {}".format(*sizes)
        elif name != MANIFEST and "tensors" in expected[name]:
            wrong = _wrong_tensors(folder / name, expected[name]["tensors"])
        if wrong:
            raise CorruptArtifact(folder / name, wrong, folder)
    if full:
        _verify_hashes(folder, present, expected)


def _wrong_tensors(path: Path, expected: dict[str, Any]) -> str | None:
    try:
        return None if _tensors(path) == expected else "holds other tensors than the manifest says"
    except ValueError as error:
        return str(error)


def _verify_hashes(
    folder: Path, present: Mapping[str, os.stat_result], expected: Mapping[str, Any]
) -> None:
    """Compare sha256 of every file, unless this process did so and no file changed since."""
    seen = tuple(
        (name, s.st_mtime_ns, s.st_ctime_ns, s.st_size, s.st_ino) for name, s in present.items()
    )
    key = os.fspath(folder.absolute())
    if _verified.get(key) == seen:
        return
    for name, entry in expected.items():
        if file_sha256(folder / name) != entry["sha256"]:
            wrong = "its content differs from the manifest (sha256)"
            raise CorruptArtifact(folder / name, wrong, folder)
    newest = max(max(status.st_mtime_ns, status.st_ctime_ns) for status in present.values())
    if time.time_ns() - newest > _RECENT_NANOSECONDS:
        _verified[key] = seen


def _tensors(path: Path) -> dict[str, dict[str, Any]]:
    """Names, dtypes and shapes of a safetensors file.

    Raises:
        ValueError: If the header is damaged or does not cover the file exactly.
    """
    return {
        name: {"dtype": entry.dtype, "shape": list(entry.shape)}
        for name, entry in sorted(read_header(path).items())
    }


def _files(folder: Path) -> dict[str, os.stat_result]:
    """List every file below a folder by its relative path, links not followed."""
    found = {}
    for where, folders, names in os.walk(folder, onerror=raise_error):
        for name in names + [name for name in folders if os.path.islink(os.path.join(where, name))]:
            path = Path(where, name)
            found[path.relative_to(folder).as_posix()] = path.lstat()
    return dict(sorted(found.items()))


def _digest(manifest: Mapping[str, Any]) -> str:
    """Hash a manifest's content; when it was made is not part of it."""
    content = {key: value for key, value in manifest.items() if key not in _NOT_DIGESTED}
    return hashlib.sha256(canonical_json(content, MANIFEST).encode()).hexdigest()
