"""Reading many checkpoints side by side, a piece ahead of whoever computes."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from graftline.merging.checkpoints import DTYPES
from graftline.merging.compatibility import Job
from graftline.merging.writing import DIRECT
from graftline.weight_files import Entry

BLOCK = 1 << 18
"""Elements computed at once, of up to three models: few enough that intermediate results stay in
the cache, and so many that calls, for each of which threads queue at the interpreter's lock, cost
little beside them."""

RUN = 2 * BLOCK
"""Elements that one thread computes before it asks for more."""

SPARSE = 128
"""Of so many elements a sample has one."""

_MODELS = 3  # whose blocks have `BLOCK` elements
_PAGE = mmap.PAGESIZE
_LOOK = 64 << 20  # bytes of a file that tell whether it lies in the page cache
_WORD = 8  # bytes; no dtype is wider
_BUFFERS = 4  # one being read, one waiting, two in use
_BUFFER_BYTES = 10 << 20  # shared by all models, so memory does not grow with their number

_mincore = ctypes.CDLL(None).mincore
_mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Segment:
    """A piece of one tensor in all models that are read; only valid until the next but one.

    Attributes:
        job: the tensor.
        offset: of its first element; a multiple of `BLOCK`.
        tensors: flat, one a model (the base first, if it is read); a kept tensor's bytes.
    """

    job: Job
    offset: int
    tensors: tuple[Tensor, ...]

    def runs(self) -> list[Segment]:
        """Cuts it into parts of `RUN` elements."""
        return [
            Segment(
                self.job, self.offset + start, tuple(t[start : start + RUN] for t in self.tensors)
            )
            for start in range(0, self.tensors[0].numel(), RUN)
        ]


def block_of(models: int) -> int:
    """Elements computed at once of so many models: memory and cache hold the same for all."""
    block = BLOCK
    while block * models > BLOCK * _MODELS:
        block //= 2
    return block


class ReadAhead:
    """Walks over tensors in pieces, read by a thread of its own.

    Use as a context manager and iterate once.

    Args:
        jobs: the tensors, in the order wanted.
        with_base: False: of merged tensors only the experts are read.
        sparse: of each piece only the first part is read, one element in `SPARSE`.
    """

    def __init__(
        self, jobs: Sequence[Job], *, with_base: bool = True, sparse: bool = False
    ) -> None:
        self._jobs = jobs
        self._with_base = with_base
        self._share = SPARSE if sparse else 1
        self._files: dict[Path, ReadFile] = {}
        self._free: SimpleQueue[Bytes | None] = SimpleQueue()
        self._ready: SimpleQueue[tuple[Segment, Bytes] | BaseException | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="read-ahead", daemon=True)

    def __enter__(self) -> ReadAhead:
        size = max((self._step(job)[1] for job in self._jobs), default=0)
        for _ in range(_BUFFERS):
            self._free.put(np.frombuffer(mmap.mmap(-1, max(size, 1)), np.uint8))
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._free.put(None)
        self._thread.join()
        for file in self._files.values():
            file.close()

    def __iter__(self) -> Iterator[Segment]:
        """Yields the segments; raises what went wrong while reading."""
        before = None
        while True:
            item = self._ready.get()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item[0]
            if before is not None:
                self._free.put(before)
            before = item[1]

    def _entries(self, job: Job) -> tuple[Entry, ...]:
        """What is read for a tensor."""
        if not job.experts:
            return (job.base,)
        return (job.base, *job.experts) if self._with_base else job.experts

    def _step(self, job: Job) -> tuple[int, int]:
        """Elements a segment, and bytes that its buffer needs."""
        widths = _widths(job, self._entries(job))
        count = _BUFFER_BYTES // sum(widths) // BLOCK * BLOCK
        count = min(max(count, BLOCK), _length(job))
        return count, sum(room_for(count * width) for width in widths)

    def _run(self) -> None:
        try:
            for job in self._jobs:
                step = self._step(job)[0]
                for offset in range(0, _length(job), max(step, 1)):
                    buffer = self._free.get()
                    if buffer is None:
                        return
                    count = -(-min(step, _length(job) - offset) // self._share)
                    self._ready.put((self._segment(job, offset, count, buffer), buffer))
        except BaseException as error:  # whoever iterates has to hear of it
            self._ready.put(error)
        self._ready.put(None)

    def _segment(self, job: Job, offset: int, count: int, buffer: Bytes) -> Segment:
        entries, place, tensors = self._entries(job), 0, []
        for entry, width in zip(entries, _widths(job, entries), strict=True):
            size = count * width
            piece = self._read(entry, offset * width, size, buffer[place : place + room_for(size)])
            dtype = DTYPES[entry.dtype] if job.experts else torch.uint8
            tensors.append(torch.from_numpy(piece).view(dtype))
            place += room_for(size)
        return Segment(job, offset, tuple(tensors))

    def _read(self, entry: Entry, place: int, size: int, room: Bytes) -> Bytes:
        if entry.origin is None:
            if entry.file not in self._files:
                self._files[entry.file] = ReadFile(entry.file)
            return self._files[entry.file].read(entry.start + place, size, room)
        found = entry.origin.read(entry.start + place, size)
        if len(found) != size:
            raise OSError(f"{entry.file}: was cut off while it was read")
        room[:size] = np.frombuffer(found, np.uint8)
        return room[:size]


class ReadFile:
    """A file that is read in large pieces, past the page cache where it does not lie there already.

    On the virtual machine where it was measured, filling the cache took more of the processor than
    reading twice does, as much as the merging itself.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._usual = os.open(path, os.O_RDONLY)
        cached = _lies_in_the_cache(self._usual)
        self._direct = None if cached else _opened_directly(path)
        os.posix_fadvise(self._usual, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def read(self, start: int, size: int, room: Bytes) -> Bytes:
        """Reads `size` bytes from byte `start` on.

        Args:
            start: from the file's beginning.
            size: how many.
            room: where to; begins where a page does, and has `room_for(size)` bytes.

        Returns:
            The bytes, somewhere in `room`.

        Raises:
            OSError: the file ends before, or cannot be read.
        """
        into, done = room[:size], 0
        if self._direct is not None and start % _WORD == 0:
            lead = start % _PAGE
            into, pages = room[lead : lead + size], room[: _whole_pages(lead + size)]
            done = max(self._read_pages(start - lead, pages) - lead, 0)
        while done < size:
            got = os.preadv(self._usual, [into[done:].data], start + done)
            if got == 0:
                raise OSError(f"{self._path}: was cut off while it was read")
            done += got
        return into

    def close(self) -> None:
        """Gives the descriptors back."""
        for descriptor in (self._usual, self._direct):
            if descriptor is not None:
                os.close(descriptor)

    def _read_pages(self, start: int, pages: Bytes) -> int:
        """Reads past the cache; tells how many bytes came, which may be fewer."""
        assert self._direct is not None
        try:
            return os.preadv(self._direct, [pages.data], start)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            os.close(self._direct)
            self._direct = None
            return 0


def _opened_directly(path: Path) -> int | None:
    """A descriptor that reads past the page cache; None where that is not done."""
    if not DIRECT:
        return None
    try:
        return os.open(path, os.O_RDONLY | DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return None


def _lies_in_the_cache(descriptor: int) -> bool:
    """Whether most of a file's beginning does; reading some to see would put more there."""
    size = min(os.fstat(descriptor).st_size, _LOOK)
    if not size:
        return True
    try:
        mapped = mmap.mmap(descriptor, size, prot=mmap.PROT_READ)
    except OSError:  # a file system that maps no files
        return True
    with mapped:
        pages = np.zeros(-(-size // _PAGE), np.uint8)
        content = np.frombuffer(mapped, np.uint8)
        failed = _mincore(content.ctypes.data, size, pages.ctypes.data)
        del content  # or the mapping could not be closed
    return failed == 0 and 2 * int((pages & 1).sum()) > len(pages)


def room_for(size: int) -> int:
    """Bytes of the pages that may hold `size` bytes, wherever in a page they begin."""
    return _whole_pages(size) + _PAGE


def _whole_pages(size: int) -> int:
    return -(-size // _PAGE) * _PAGE


def _length(job: Job) -> int:
    """Elements of a merged tensor, bytes of a kept one."""
    return job.base.elements if job.experts else job.base.size


def _widths(job: Job, entries: Sequence[Entry]) -> list[int]:
    return [DTYPES[entry.dtype].itemsize if job.experts else 1 for entry in entries]
