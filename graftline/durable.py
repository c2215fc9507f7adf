"""Writing that survives a crash: fsync what was written, then show it with one rename."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from graftline.errors import GraftlineError

DENIED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_BLOCK = 1 << 20
_TEMPORARY = re.compile(r"\.tmp-.+-(?P<pid>[0-9]+)-(?P<host>[0-9a-f]{8})[0-9a-f]{8}")

_log = logging.getLogger(__name__)
_own_temporaries: set[str] = set()  # names of temporary siblings that this process is filling


class StoreUnwritable(GraftlineError):
    """A folder cannot be written: the disk is full, or the folder is read-only."""

    def __init__(self, folder: Path, wrong: str, remedy: str) -> None:
        super().__init__(f"{folder}: cannot be written: {wrong}. {remedy} Finished steps are kept.")
        self.folder = folder


def atomic_write_bytes(path: Path | str, content: bytes) -> None:
    """Replace a file as one step: readers see the old content or the new, also after a crash.

    Missing parent folders are made.

    Raises:
        StoreUnwritable: If the disk is full or the folder is read-only.
    """
    path = Path(path)
    with naming_disk_faults(path.parent):
        make_folder(path.parent)
        temporary = temporary_sibling(path)
        try:
            write_synced(temporary, content)
            os.replace(temporary, path)
            fsync_folder(path.parent)
        finally:
            remove(temporary)


def atomic_write_text(path: Path | str, content: str) -> None:
    """Replace a UTF-8 text file as one step; see `atomic_write_bytes`."""
    atomic_write_bytes(path, content.encode())


def temporary_sibling(target: Path) -> Path:
    """Name (not make) a path beside `target` for building it; `Store.sweep` knows such names."""
    host, unique = host_token(), secrets.token_hex(4)
    name = f".tmp-{target.name}-{os.getpid()}-{host}{unique}"
    _own_temporaries.add(name)
    return target.parent / name


def publish_folder(temporary: Path, target: Path) -> None:
    """Make a finished folder appear under its name: fsync all of it, rename, fsync the parent.

    Both must lie on the same file system. For names that `Store.sweep` cleans up after a crash,
    build in `temporary_sibling(target)`.

    Raises:
        FileExistsError: If `target` exists and is not empty; `temporary` is left as it is.
        StoreUnwritable: If the disk is full or the folder is read-only; `temporary` is left, too.
    """
    with naming_disk_faults(target.parent):
        fsync_tree(temporary)
        rename_new(temporary, target)


@contextmanager
def building(target: Path) -> Iterator[Path]:
    """Give an empty folder beside `target` to build it in; what is left of it at the end goes.

    Missing parent folders are made. Whoever builds renames it (`rename_new`, `publish_folder`).

    Raises:
        StoreUnwritable: If the disk is full or the folder is read-only.
    """
    target = target.absolute()
    with naming_disk_faults(target.parent):
        make_folder(target.parent)
        temporary = temporary_sibling(target)
        try:
            temporary.mkdir()
            yield temporary
        finally:
            remove(temporary)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Build a sealed folder that appears whole or not at all; see `building`.

    What killed processes left of earlier tries goes first.

    Raises:
        FileExistsError: If `target` exists and is not empty.
        StoreUnwritable: If the disk is full or the folder is read-only.
    """
    sweep_siblings(target.absolute())
    with building(target) as temporary:
        yield temporary
        rename_new(temporary, target.absolute())


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, as 64 hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fsync_folder(folder: Path) -> None:
    """Force a folder's entries (names made, renamed or removed in it) to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems
            raise
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Force every file and folder below a folder, and itself, to the disk, the innermost first.

    Raises:
        StoreUnwritable: If the disk is full or read-only; it names the folder's parent.
    """
    with naming_disk_faults(folder.parent):
        for where, _, names in os.walk(folder, topdown=False, onerror=raise_error):
            for name in names:
                with open(os.path.join(where, name), "rb") as file:
                    os.fsync(file.fileno())
            fsync_folder(Path(where))


@contextmanager
def naming_disk_faults(folder: Path) -> Iterator[None]:
    """Turn a full disk or a read-only folder into `StoreUnwritable`; pass on the rest."""
    try:
        yield
    except Exception as error:
        code = None if isinstance(error, GraftlineError) else _disk_fault(error, folder)
        if code is None:
            raise
        remedy = (
            "Free some space there (or raise the quota) and run again."
            if code in _FULL
            else "Make it writable for this user, or choose another folder, and run again."
        )
        raise StoreUnwritable(folder, os.strerror(code), remedy) from error


def _disk_fault(error: BaseException, folder: Path) -> int | None:
    """Return the errno if `error` says that `folder` cannot be written, else None."""
    if isinstance(error, OSError):
        code, named = error.errno, error.filename
    else:  # safetensors (Rust) puts the number into its text
        match = re.search(r"\(os error ([0-9]+)\)|(No space left on device)", str(error))
        code, named = (int(match[1]) if match[1] else errno.ENOSPC) if match else None, None
    if not isinstance(named, str | bytes | os.PathLike):
        return code if code in _FULL or code == errno.EROFS else None
    path, here = Path(os.fsdecode(named)).absolute(), folder.absolute()
    related = path.is_relative_to(here) or here.is_relative_to(path)
    return code if related and code in _FULL | DENIED else None


def make_folder(folder: Path) -> None:
    """Make a folder and its missing parents, each durable."""
    if folder.is_dir():
        return
    if not os.path.lexists(folder):
        make_folder(folder.parent)
        with suppress(FileExistsError):
            os.mkdir(folder)
    # Only now: between the two looks above, another process may have made it.
    if not folder.is_dir():
        raise StoreUnwritable(folder, "it is not a folder", "Move it away and run again.")
    fsync_folder(folder.parent)


def why_unwritable(folder: Path) -> str | None:
    """Why nothing can be written in a folder, or where it would be made; `None` if it can.

    A block is written, for a full disk takes an empty file.
    """
    try:
        with tempfile.TemporaryFile(dir=nearest(folder)) as file:
            file.write(bytes(_BLOCK))
            file.flush()
    except OSError as error:
        return error.strerror or type(error).__name__
    return None


def nearest(folder: Path) -> Path:
    """The folder itself, or what stands where its first missing parent would be made."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def write_synced(path: Path, content: bytes) -> None:
    """Write a new file and force it to the disk; its name is durable after `fsync_folder`."""
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def rename_new(temporary: Path, target: Path) -> None:
    """Rename a synced folder to a name that must be free, and make that durable.

    Raises:
        FileExistsError: If `target` exists and is not an empty folder.
    """
    try:
        os.rename(temporary, target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            source, there = os.fspath(temporary), os.fspath(target)
            raise FileExistsError(errno.EEXIST, "exists already", source, None, there) from error
        raise
    _own_temporaries.discard(temporary.name)
    fsync_folder(target.parent)


def remove(path: Path) -> None:
    """Remove a temporary file or folder as far as possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
    _own_temporaries.discard(path.name)


def discard(folder: Path) -> None:
    """Remove a folder so that nobody ever sees half of it under its name."""
    aside = temporary_sibling(folder)
    try:
        os.rename(folder, aside)
    except FileNotFoundError:
        pass
    except OSError as error:
        _log.warning("%s: left behind (%s); it can be deleted", folder, error.strerror)
    remove(aside)


def host_token() -> str:
    """Abbreviate this host's name for use in file names: 8 hexadecimal digits."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def process_namespace() -> str:
    """What process ids of this process are numbers in: containers of one host have their own."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""  # no Linux


def left_behind(path: Path) -> bool:
    """Say whether a path is a temporary sibling whose writer was on this host and is dead."""
    match = _TEMPORARY.fullmatch(path.name)
    if match is None or match["host"] != host_token():
        return False
    pid = int(match["pid"])
    return path.name not in _own_temporaries if pid == os.getpid() else not process_runs(pid)


def sweep_siblings(target: Path) -> None:
    """Removes what killed processes of this host left of building `target`."""
    if target.parent.is_dir():
        for path in target.parent.iterdir():
            if path.name.startswith(f".tmp-{target.name}-") and left_behind(path):
                remove(path)


def process_runs(pid: int) -> bool:
    """Say whether a process of this host runs; one that ended but was not waited for does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return True


def raise_error(error: OSError) -> NoReturn:
    """Stop an `os.walk` at its first error instead of leaving a folder out."""
    raise error
