"""What a safetensors file holds, read from its header alone and checked against its length."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Bytes of the dtypes that can be merged, by safetensors' names."""

_LARGEST_HEADER_BYTES = 100_000_000  # the limit that the safetensors format sets itself


@dataclass(frozen=True)
class Entry:
    """One stored tensor: `size` bytes from `start` of a file.

    Attributes:
        file: the shard.
        dtype: as safetensors calls it.
        shape: may be empty.
        start: of its bytes, from the file's beginning.
        size: in bytes.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def floating(self) -> bool:
        """Whether it can be merged."""
        return self.dtype in FLOAT_BYTES


def read_header(path: Path) -> dict[str, Entry]:
    """Reads a safetensors header.

    Raises:
        ValueError: it is damaged, or does not cover the file exactly (cut off).
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LARGEST_HEADER_BYTES):
            raise ValueError("its safetensors header is cut off or damaged")
        content = file.read(length)
    try:
        header = json.loads(content)
        header.pop("__metadata__", None)
        entries = {name: _entry(path, 8 + length, raw) for name, raw in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"its safetensors header is damaged ({error!r})") from error
    end = max((entry.start + entry.size for entry in entries.values()), default=8 + length)
    if end != size:
        raise ValueError(f"its tensors need {end} bytes, the file has {size} (cut off?)")
    return entries


def _entry(path: Path, first: int, raw: Mapping[str, Any]) -> Entry:
    begin, end = (int(offset) for offset in raw["data_offsets"])
    shape = tuple(int(length) for length in raw["shape"])
    entry = Entry(path, str(raw["dtype"]), shape, first + begin, end - begin)
    if begin < 0 or end < begin or any(length < 0 for length in shape):
        raise ValueError(f"offsets {begin}..{end}, shape {shape}")
    if entry.floating and entry.elements * FLOAT_BYTES[entry.dtype] != entry.size:
        raise ValueError(f"{entry.size} bytes for {entry.dtype} {shape}")
    return entry
