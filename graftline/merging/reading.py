"""Reading many checkpoints side by side, a piece ahead of whoever computes."""

from __future__ import annotations

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
from graftline.weight_files import Entry

BLOCK = 1 << 17
"""Elements computed at once: few enough that intermediate results stay in the cache, and so many
that calls cost little beside them."""

RUN = 4 * BLOCK
"""Elements that one thread computes before it asks for more."""

SPARSE = 128
"""Of so many elements a sample has one."""

_BUFFERS = 4  # one being read, one waiting, two in use
_BUFFER_BYTES = 10 << 20  # shared by all models, so memory does not grow with their number

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
        self._files: dict[Path, int] = {}
        self._free: SimpleQueue[Bytes | None] = SimpleQueue()
        self._ready: SimpleQueue[tuple[Segment, Bytes] | BaseException | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="read-ahead", daemon=True)

    def __enter__(self) -> ReadAhead:
        size = max((self._step(job)[1] for job in self._jobs), default=0)
        for _ in range(_BUFFERS):
            self._free.put(np.empty(size, np.uint8))
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
        for descriptor in self._files.values():
            os.close(descriptor)

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
        return count, sum(_aligned(count * width) for width in widths)

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
            piece = buffer[place : place + count * width]
            self._read(entry, offset * width, piece)
            dtype = DTYPES[entry.dtype] if job.experts else torch.uint8
            tensors.append(torch.from_numpy(piece).view(dtype))
            place += _aligned(count * width)
        return Segment(job, offset, tuple(tensors))

    def _read(self, entry: Entry, place: int, into: Bytes) -> None:
        if entry.origin is not None:
            found = entry.origin.read(entry.start + place, into.size)
            if len(found) != into.size:
                raise OSError(f"{entry.file}: was cut off while it was read")
            into[:] = np.frombuffer(found, np.uint8)
            return
        descriptor = self._descriptor(entry.file)
        done = 0
        while done < into.size:
            got = os.preadv(descriptor, [into[done:].data], entry.start + place + done)
            if got == 0:
                raise OSError(f"{entry.file}: was cut off while it was read")
            done += got

    def _descriptor(self, file: Path) -> int:
        if file not in self._files:
            descriptor = os.open(file, os.O_RDONLY)
            self._files[file] = descriptor
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return self._files[file]


def _length(job: Job) -> int:
    """Elements of a merged tensor, bytes of a kept one."""
    return job.base.elements if job.experts else job.base.size


def _widths(job: Job, entries: Sequence[Entry]) -> list[int]:
    return [DTYPES[entry.dtype].itemsize if job.experts else 1 for entry in entries]


def _aligned(size: int) -> int:
    """Rounded up so that the next model's numbers begin where any dtype may."""
    return -(-size // 64) * 64
