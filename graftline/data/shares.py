"""Features of a split in shares: each process of a team encodes one, and goes on where it stopped.

A share is a file to which rows are appended, one of their ids, and a record of how many of them
reached the disk. Shares begin between batches, so that rows meet the same neighbours, and have the
same bits, however many processes encode them and however often they are stopped.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from graftline.durable import atomic_write_text
from graftline.errors import GraftlineError
from graftline.team import current

TENSOR = "features"
FEATURES_FILE = "features.safetensors"
ROWS_FILE = "rows.json"
SHARES = "shares"
_RECORD_EVERY = 16
"""Batches between two records: what a killed process encodes again at most."""

Encode = Callable[[Sequence[str], Sequence[Any]], torch.Tensor]
"""Ids and stored media of some rows -> their features, float16 (rows, tokens, width)."""
Progress = Callable[[int], None]
"""Called with the number of rows that are done."""


@dataclass(frozen=True)
class _Record:
    """How far a share is.

    Attributes:
        rows: how many are on the disk.
        tokens: of a row; 0 before the first one.
        width: of a token.
    """

    rows: int = 0
    tokens: int = 0
    width: int = 0


def share_of(total: int, batch: int) -> range:
    """The rows of a split that this process encodes: whole batches, in one piece."""
    team, batches = current(), -(-total // batch)
    start, end = (batches * rank // team.size * batch for rank in (team.rank, team.rank + 1))
    return range(min(start, total), min(end, total))


def encode_share(
    rows: Any,
    encode: Encode,
    folder: Path,
    *,
    batch: int,
    progress: Progress | None = None,
    seen: Callable[[int, int], None] | None = None,
) -> None:
    """Encodes this process's share of a split's rows, from where it was stopped.

    Args:
        rows: a `datasets` dataset, or what slices as one, with the columns `id` and `media`.
        encode: gives features of a batch.
        folder: where shares lie; made if absent.
        batch: rows encoded together.
        progress: called after each batch, and first with what was done before.
        seen: told tokens and width of rows that were encoded before.

    Raises:
        GraftlineError: as `encode` does.
    """
    own = share_of(len(rows), batch)
    folder.mkdir(parents=True, exist_ok=True)
    stem = _stem(folder, current().rank)
    record = _read_record(stem)
    if record.rows and seen:
        seen(record.tokens, record.width)
    if record.rows and progress:
        progress(record.rows)
    size = 2 * record.rows * record.tokens * record.width
    with (
        _opened(stem, ".bin", size) as values,
        _opened(stem, ".ids", _bytes_of_lines(stem, record.rows)) as names,
    ):
        starts = range(own.start + record.rows, own.stop, batch)
        for number, start in enumerate(starts, start=1):
            part = rows[start : min(start + batch, own.stop)]
            ids = [str(name) for name in part["id"]]
            features = encode(ids, part["media"]).contiguous()
            values.write(features.numpy().astype("<f2", copy=False).tobytes())
            names.write("".join(json.dumps(name) + "\n" for name in ids).encode())
            record = _Record(record.rows + len(ids), features.shape[1], features.shape[2])
            if number % _RECORD_EVERY == 0 or number == len(starts):
                _keep(stem, record, (values, names))
            if progress:
                progress(len(ids))


def join_shares(folder: Path, out_folder: Path, described: Mapping[str, str]) -> None:
    """Makes one memory-mapped file of a team's shares, which all are finished.

    Args:
        folder: where the shares lie.
        out_folder: gets the tensor `features`, float16 (rows, tokens, width), and the ids.
        described: the encoder's name and sha256.

    Raises:
        GraftlineError: rows of two shares differ in tokens or width.
    """
    stems = [_stem(folder, rank) for rank in range(current().size)]
    records = [record for record in map(_read_record, stems) if record.rows]
    shapes = sorted({(record.tokens, record.width) for record in records})
    if len(shapes) > 1:
        found = " and ".join(f"{tokens} tokens of width {width}" for tokens, width in shapes)
        raise GraftlineError(
            f"rows have {found}; all must have the same. Set tokens of the encoder, and every row "
            "is averaged down to so many."
        )
    tokens, width = shapes[0] if shapes else (0, 0)
    out_folder.mkdir(parents=True, exist_ok=True)
    with (out_folder / FEATURES_FILE).open("wb") as out:
        _write_header(out, (sum(record.rows for record in records), tokens, width))
        for stem in stems:
            with stem.with_suffix(".bin").open("rb") as values:
                shutil.copyfileobj(values, out, 1 << 22)
    ids = [
        json.loads(line)
        for stem in stems
        for line in stem.with_suffix(".ids").read_text(encoding="utf-8").splitlines()
    ]
    content = json.dumps({**described, "ids": ids})
    (out_folder / ROWS_FILE).write_text(content, encoding="utf-8")


def _write_header(stream: BinaryIO, shape: tuple[int, int, int]) -> None:
    """Writes the head of a safetensors file whose one float16 tensor is appended afterwards."""
    count = shape[0] * shape[1] * shape[2]
    entry = {"dtype": "F16", "shape": list(shape), "data_offsets": [0, 2 * count]}
    header = json.dumps({TENSOR: entry}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    stream.write(struct.pack("<Q", len(header)) + header)


def _stem(folder: Path, rank: int) -> Path:
    return folder / f"share-{rank + 1}-of-{current().size}"


def _read_record(stem: Path) -> _Record:
    """What reached the disk; nothing where there is no record, or none that can be read."""
    try:
        return _Record(**json.loads(stem.with_suffix(".json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return _Record()


def _keep(stem: Path, record: _Record, streams: Sequence[BinaryIO]) -> None:
    """Makes sure that rows are on the disk before the record says so."""
    for stream in streams:
        stream.flush()
        os.fsync(stream.fileno())
    atomic_write_text(stem.with_suffix(".json"), json.dumps(asdict(record)))


def _opened(stem: Path, suffix: str, size: int) -> BinaryIO:
    """A file to append to, behind its first `size` bytes."""
    path = stem.with_suffix(suffix)
    path.touch()
    stream = path.open("r+b")
    stream.truncate(size)
    stream.seek(size)
    return stream


def _bytes_of_lines(stem: Path, count: int) -> int:
    if not count:
        return 0
    with stem.with_suffix(".ids").open("rb") as lines:
        return sum(len(next(lines)) for _ in range(count))
