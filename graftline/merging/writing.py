"""Writing safetensors files front to back in a thread of its own, hashing on the way."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import mmap
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from types import TracebackType

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
_WAITING = 16  # pieces that wait to be written
_PIECE = 4 << 20  # written at once, a file
DIRECT = getattr(os, "O_DIRECT", 0)
"""Opens a file past the page cache; Linux has it."""


@dataclass(frozen=True)
class Stored:
    """How a tensor will lie in a file: `dtype` as safetensors calls it, `size` in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int


def split(tensors: Sequence[Stored], most: int, widths: Mapping[str, int]) -> list[list[Stored]]:
    """Deals tensors out to files of at most `most` bytes of data, one tensor at least, in order.

    A file also ends where the next tensor would not lie at a multiple of its dtype's width.

    Args:
        tensors: in the order in which they will be written.
        most: bytes.
        widths: bytes of one element by dtype; 8 if not in it.
    """
    files: list[list[Stored]] = []
    used = 0
    for tensor in tensors:
        if not files or used + tensor.size > most or used % widths.get(tensor.dtype, 8):
            files.append([])
            used = 0
        files[-1].append(tensor)
        used += tensor.size
    return files


def header(tensors: Sequence[Stored], metadata: Mapping[str, str]) -> bytes:
    """The head of a safetensors file whose tensors follow in this order without gaps."""
    content: dict[str, object] = {"__metadata__": dict(metadata)}
    place = 0
    for tensor in tensors:
        content[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [place, place + tensor.size],
        }
        place += tensor.size
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class _File:
    """A new file, written in large pieces past the page cache where the file system lets one.

    Copying weights into new pages of the cache can cost more than all of the merge's reading, as
    on the virtual machine where it was measured; the merge does not read them again.
    """

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        try:
            self._descriptor = os.open(path, flags | DIRECT, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            path.unlink(missing_ok=True)  # some file systems make the file and then refuse
            self._descriptor = os.open(path, flags, 0o666)
        self._digest = hashlib.sha256()
        self._piece = np.frombuffer(mmap.mmap(-1, _PIECE), np.uint8)  # begins where a page does
        self._filled = 0
        self.size = 0

    def append(self, content: Bytes) -> None:
        """Adds bytes; they reach the disk a piece at a time."""
        self._digest.update(content.data)
        self.size += content.size
        while content.size:
            part = content[: _PIECE - self._filled]
            self._piece[self._filled : self._filled + part.size] = part
            self._filled += part.size
            content = content[part.size :]
            if self._filled == _PIECE:
                self._flush()

    def finish(self) -> None:
        """Writes what is left, which need not fill a page."""
        if self._filled:
            self._through_the_cache()
            self._flush()

    def close(self) -> None:
        """Gives the descriptor back, whether finished or not."""
        os.close(self._descriptor)

    def hexdigest(self) -> str:
        """The sha256 of all bytes so far."""
        return self._digest.hexdigest()

    def _flush(self) -> None:
        left = self._piece[: self._filled]
        while left.size:
            try:
                left = left[os.write(self._descriptor, left.data) :]
            except OSError as error:
                if error.errno != errno.EINVAL or not self._through_the_cache():
                    raise
        self._filled = 0

    def _through_the_cache(self) -> bool:
        """Writes as usual from here on; False: it did already."""
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~DIRECT)
        return bool(flags & DIRECT)


class Writing:
    """Writes files piece by piece, in the order given; use as a context manager.

    Args:
        folder: where the files go; each must be new.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._queue: Queue[tuple[str, Bytes] | None] = Queue(_WAITING)
        self._files: dict[str, _File] = {}
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="write-behind", daemon=True)

    def __enter__(self) -> Writing:
        self._thread.start()
        return self

    def write(self, name: str, content: Bytes | bytes) -> None:
        """Appends to a file, which is made at its first piece.

        Raises:
            OSError: an earlier piece could not be written.
        """
        if self._error is not None:
            raise self._error
        pieces = np.frombuffer(content, np.uint8) if isinstance(content, bytes) else content
        self._queue.put((name, pieces))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._queue.put(None)
        self._thread.join()
        try:
            if kind is None:
                self._finish()
        finally:
            for file in self._files.values():
                file.close()

    def _finish(self) -> None:
        if self._error is not None:
            raise self._error
        for file in self._files.values():
            file.finish()

    def files(self) -> dict[str, dict[str, str | int]]:
        """After the end: name -> sha256 and size."""
        return {
            name: {"sha256": file.hexdigest(), "size": file.size}
            for name, file in sorted(self._files.items())
        }

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._error is None:  # after an error the queue is only emptied
                try:
                    self._append(*item)
                except BaseException as error:
                    self._error = error

    def _append(self, name: str, content: Bytes) -> None:
        if name not in self._files:
            path = self._folder / name
            path.parent.mkdir(exist_ok=True)
            self._files[name] = _File(path)
        self._files[name].append(content)
