"""Files that tables name: they stay inside their folder, and are hashed once."""

from __future__ import annotations

import csv
import io
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from graftline.data.rows import MediaError
from graftline.durable import atomic_write_bytes, file_sha256
from graftline.errors import GraftlineError

MAX_FILE_BYTES = 1 << 30


@contextmanager
def open_text(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """Opens a table's text, CSV or JSON lines, less the byte order mark that spreadsheets write.

    Args:
        path: the file.
        newline: as of `open`; empty for CSV.

    Raises:
        GraftlineError: what is read inside is no UTF-8 or no CSV, or the file cannot be read.
    """
    try:
        with path.open(encoding="utf-8-sig", newline=newline) as stream:
            yield stream
    except UnicodeDecodeError as error:
        raise GraftlineError(f"{path}: is not UTF-8 ({error.reason}); save it as UTF-8") from error
    except csv.Error as error:
        raise GraftlineError(f"{path}: is not a readable CSV ({error}); save it anew") from error
    except OSError as error:
        raise GraftlineError(f"{path}: cannot be read ({error.strerror})") from error


def inside(folder: Path, name: str) -> Path:
    """A file below a folder, named relative to it.

    Raises:
        GraftlineError: the name leaves the folder, by itself or through a link.
    """
    refused = GraftlineError(
        f"{name}: leads out of {folder}; media lie in the table's folder or below it. Copy it there"
    )
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise refused
    try:
        real = (folder / name).resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise GraftlineError(f"{name!r}: is no usable file name ({error})") from error
    if not real.is_relative_to(folder.resolve()):
        raise refused
    return folder / name


def check_file(path: Path, most: int | None = None) -> None:
    """Refuse what is no regular file with bytes in it.

    Args:
        path: the file.
        most: bytes that it may have; any number if left out.

    Raises:
        MediaError: says what is there instead.
    """
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise MediaError("there is no such file") from error
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
        raise MediaError(f"cannot be read ({error})") from error
    if not stat.S_ISREG(status.st_mode):
        raise MediaError("is no regular file")
    if status.st_size == 0:
        raise MediaError("is empty (0 bytes)")
    if most is not None and status.st_size > most:
        raise MediaError(f"has {status.st_size} bytes; at most {most} are read")


def read_file(path: Path) -> bytes:
    """The bytes of a file of at most `MAX_FILE_BYTES`.

    Raises:
        MediaError: there is no such file, or it is empty, too large or cannot be read.
    """
    check_file(path, MAX_FILE_BYTES)
    try:
        return path.read_bytes()
    except OSError as error:
        raise MediaError(f"cannot be read ({error})") from error


class FileHashes:
    """The sha256 of files, remembered as long as size and time of change stay.

    Args:
        path: parquet file that remembers them between processes; None: only in this one.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._known: dict[str, tuple[int, int, str]] = {}
        self._changed = False
        if path is not None and path.is_file():
            try:
                columns = pq.read_table(path).to_pydict()
                rows = zip(columns["size"], columns["changed"], columns["sha256"], strict=True)
                self._known = dict(zip(columns["file"], rows, strict=True))
            except (pa.ArrowException, OSError, ValueError, KeyError):
                self._known = {}  # only a memory: what is damaged is made anew

    def sha256(self, path: Path) -> str:
        """The sha256 of a file's bytes.

        Raises:
            MediaError: the file cannot be used.
        """
        check_file(path)
        name = str(path.absolute())
        try:
            status = path.stat()
            found = self._known.get(name)
            if found is not None and found[:2] == (status.st_size, status.st_mtime_ns):
                return found[2]
            digest = file_sha256(path)
        except OSError as error:
            raise MediaError(f"cannot be read ({error})") from error
        self._known[name] = (status.st_size, status.st_mtime_ns, digest)
        self._changed = True
        return digest

    def save(self) -> None:
        """Writes down what was learned, if anything was."""
        if self._path is None or not self._changed:
            return
        sizes, changed, digests = zip(*self._known.values(), strict=True)
        columns = {"file": list(self._known), "size": sizes, "changed": changed}
        content = io.BytesIO()
        pq.write_table(pa.table({**columns, "sha256": digests}), content)
        atomic_write_bytes(self._path, content.getvalue())
        self._changed = False
