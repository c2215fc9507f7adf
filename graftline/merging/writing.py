"""Writing safetensors files front to back in a thread of its own, hashing on the way."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue
from types import TracebackType
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
_WAITING = 16  # pieces that wait to be written
_SYNC_BYTES = 64 << 20  # forced to the disk so often that the last sync is short


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


@dataclass
class _File:
    stream: BinaryIO
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)
    size: int = 0
    unsynced: int = 0


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
        for file in self._files.values():
            file.stream.close()
        if self._error is not None and kind is None:
            raise self._error

    def files(self) -> dict[str, dict[str, str | int]]:
        """After the end: name -> sha256 and size."""
        return {
            name: {"sha256": file.digest.hexdigest(), "size": file.size}
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
            self._files[name] = _File(open(path, "xb", buffering=0))  # noqa: SIM115
        file = self._files[name]
        done = 0
        while done < content.size:
            done += file.stream.write(content[done:].data)
        file.digest.update(content.data)
        file.size += content.size
        file.unsynced += content.size
        if file.unsynced >= _SYNC_BYTES:
            os.fdatasync(file.stream.fileno())
            file.unsynced = 0
