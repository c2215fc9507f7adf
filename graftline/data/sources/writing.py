"""Rows into parquet files, a batch at a time, so that media are never all in memory."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

import pyarrow.parquet as pq

from graftline.data.rows import SPLITS, Row, as_columns, schema

_ROWS = 400
_BYTES = 32 << 20


class RowsWriter:
    """Writes `<split>.parquet` into a folder; the same rows give the same bytes.

    Args:
        folder: where to; it is there.
        modality: for the rows' ids.
    """

    def __init__(self, folder: Path, modality: str) -> None:
        from datasets import Features  # takes a second, and most who know of imports write none

        self._folder, self._modality = folder, modality
        self._schema = Features.from_arrow_schema(schema()).arrow_schema
        self._writers = {split: self._open(split) for split in SPLITS}
        self._waiting: dict[str, list[Row]] = {split: [] for split in SPLITS}
        self._bytes = dict.fromkeys(SPLITS, 0)
        self.counts: dict[str, dict[str, int]] = {split: {} for split in SPLITS}

    def _open(self, split: str) -> pq.ParquetWriter:
        return pq.ParquetWriter(
            self._folder / f"{split}.parquet",
            self._schema,
            compression="zstd",
            compression_level=3,
            use_dictionary=["task", "question"],
        )

    def add(
        self, split: str, media: bytes, task: str, question: str, answers: list[str], source: str
    ) -> None:
        """Adds a row behind the last one of its split."""
        counts = self.counts[split]
        name = f"{self._modality}-{split}-{sum(counts.values()):05d}"
        counts[task] = counts.get(task, 0) + 1
        self._waiting[split].append(Row(name, media, task, question, answers, source))
        self._bytes[split] += len(media)
        if len(self._waiting[split]) == _ROWS or self._bytes[split] > _BYTES:
            self._flush(split)

    def _flush(self, split: str) -> None:
        import pyarrow as pa

        rows = self._waiting[split]
        if rows:
            self._writers[split].write_table(pa.table(as_columns(rows), schema=self._schema))
        self._waiting[split], self._bytes[split] = [], 0

    def __enter__(self) -> RowsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes the files; they are forced to the disk unless something went wrong."""
        for split, writer in self._writers.items():
            if error is None:
                self._flush(split)
            writer.close()
            if error is None:
                with (self._folder / f"{split}.parquet").open("rb") as file:
                    os.fsync(file.fileno())
