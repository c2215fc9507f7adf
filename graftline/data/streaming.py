"""A split that is read a few rows at a time: media of large sets never fill the memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from graftline.data.rows import column_problems
from graftline.errors import GraftlineError

TEXT_COLUMNS = ("id", "task", "question", "answers")
_BATCH = 64


class SplitRows:
    """The rows of a parquet file, as `compute_features` takes them.

    Args:
        path: a file of rows as `graftline.data.rows` describes them.
        limit: use only the first rows; all when None.

    Raises:
        GraftlineError: the file is missing, damaged or has other columns.
    """

    def __init__(self, path: Path, limit: int | None = None) -> None:
        self._path = path
        self._file = open_parquet(path)
        problems = column_problems(self._file.schema_arrow.empty_table())
        if problems:
            raise GraftlineError(
                f"{path}: {'; '.join(problems)}. Mend it or run `graftline data build`."
            )
        count = int(self._file.metadata.num_rows)
        self._length = count if limit is None else min(limit, count)
        self._batches: Iterator[Any] = iter(())
        self._next = 0

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, part: slice) -> dict[str, list[Any]]:
        """The ids and media of rows; the next ones come without reading anything again."""
        start, stop, _ = part.indices(self._length)
        if start != self._next or start == 0:
            self._batches, self._next = self._rows_from(start)
        found: dict[str, list[Any]] = {"id": [], "media": []}
        for row in self._batches:
            if self._next >= start:
                found["id"].append(row["id"])
                found["media"].append(row["media"])
            self._next += 1
            if self._next >= stop:
                break
        return found

    def _rows_from(self, start: int) -> tuple[Iterator[dict[str, Any]], int]:
        """Rows from the start of the row group in which a row lies, and the number of the first."""
        metadata, first, skipped = self._file.metadata, 0, 0
        while (
            first + 1 < metadata.num_row_groups
            and skipped + metadata.row_group(first).num_rows <= start
        ):
            skipped += metadata.row_group(first).num_rows
            first += 1
        return self._rows(range(first, metadata.num_row_groups)), skipped

    def _rows(self, groups: range) -> Iterator[dict[str, Any]]:
        try:
            for batch in self._file.iter_batches(
                batch_size=_BATCH, row_groups=list(groups), columns=["id", "media"]
            ):
                yield from batch.to_pylist()
        except (pa.ArrowException, OSError, ValueError) as error:
            raise GraftlineError(f"{self._path} is damaged ({error}); make it anew") from error

    def texts(self) -> list[dict[str, Any]]:
        """Id, task, question and answers of every row."""
        table = self._file.read(columns=list(TEXT_COLUMNS)).select(list(TEXT_COLUMNS))
        rows: list[dict[str, Any]] = table.slice(0, self._length).to_pylist()
        return rows


def open_parquet(path: Path) -> pq.ParquetFile:
    """Opens a parquet file; nothing but its end is read.

    Raises:
        GraftlineError: the file is missing, truncated or not parquet.
    """
    if not path.is_file():
        raise GraftlineError(f"{path} is missing; run `graftline data build` to make it")
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise GraftlineError(
            f"{path} is not a readable parquet file ({error}); delete it and run "
            "`graftline data build`"
        ) from error
