"""What a safetensors file holds, read from its header alone and checked against its length."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Bytes of the dtypes that can be merged, by safetensors' names."""

_LARGEST_HEADER_BYTES = 100_000_000  # the limit that the safetensors format sets itself


class Origin(Protocol):
    """A file that lies elsewhere, of which this machine has the name alone."""

    size: int

    def read(self, start: int, count: int) -> bytes:
        """So many of its bytes."""

    def identity(self) -> str:
        """What is another when its content is."""


@dataclass(frozen=True)
class Entry:
    """One stored tensor: `size` bytes from `start` of a file.

    Attributes:
        file: the shard.
        dtype: as safetensors calls it.
        shape: may be empty.
        start: of its bytes, from the file's beginning.
        size: in bytes.
        origin: where its bytes are read, if not in `file`.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int
    origin: Origin | None = field(default=None, repr=False, compare=False)

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def floating(self) -> bool:
        """Whether it can be merged."""
        return self.dtype in FLOAT_BYTES

    def read(self, place: int, count: int) -> bytes:
        """At most `count` of its bytes, from byte `place` on."""
        count = min(count, self.size - place)
        return _bytes(self.file, self.origin, self.start + place, count)


def read_header(path: Path, origin: Origin | None = None) -> dict[str, Entry]:
    """Reads a safetensors header.

    Args:
        path: the file.
        origin: where its content is, if not there.

    Raises:
        ValueError: it is damaged, or does not cover the file exactly (cut off).
        OSError: the file cannot be read.
    """
    size = origin.size if origin is not None else path.stat().st_size
    length = int.from_bytes(_bytes(path, origin, 0, 8), "little")
    if size < 8 or length > min(size - 8, _LARGEST_HEADER_BYTES):
        raise ValueError("its safetensors header is cut off or damaged")
    content = _bytes(path, origin, 8, length)
    try:
        header = json.loads(content)
        header.pop("__metadata__", None)
        entries = {name: _entry(path, origin, 8 + length, raw) for name, raw in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"its safetensors header is damaged ({error!r})") from error
    end = max((entry.start + entry.size for entry in entries.values()), default=8 + length)
    if end != size:
        raise ValueError(f"its tensors need {end} bytes, the file has {size} (cut off?)")
    return entries


def _entry(path: Path, origin: Origin | None, first: int, raw: Mapping[str, Any]) -> Entry:
    begin, end = (int(offset) for offset in raw["data_offsets"])
    shape = tuple(int(length) for length in raw["shape"])
    entry = Entry(path, str(raw["dtype"]), shape, first + begin, end - begin, origin)
    if begin < 0 or end < begin or any(length < 0 for length in shape):
        raise ValueError(f"offsets {begin}..{end}, shape {shape}")
    if entry.floating and entry.elements * FLOAT_BYTES[entry.dtype] != entry.size:
        raise ValueError(f"{entry.size} bytes for {entry.dtype} {shape}")
    return entry


def _bytes(path: Path, origin: Origin | None, start: int, count: int) -> bytes:
    if origin is not None:
        return origin.read(start, count)
    with open(path, "rb") as file:
        return os.pread(file.fileno(), count, start)
