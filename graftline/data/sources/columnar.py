"""Sources that are columnar files, read in small batches: parquet, arrow, data sets of the hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from graftline.data.files import FileHashes
from graftline.data.kinds import FEATURES, encode_features
from graftline.data.rows import MediaError
from graftline.data.sources.entries import (
    Columns,
    Entry,
    Medium,
    RowError,
    columns_of,
    entry_of,
    split_named,
)
from graftline.data.sources.tables import MediaFiles, files_of
from graftline.errors import GraftlineError
from graftline.settings.sources import SourceSettings

_ROWS = 64
"""Rows that are in memory at once."""


class Held:
    """Media that a column holds: bytes, `{bytes, path}`, a file's name, or lists of numbers.

    Args:
        files: finds media by name; None where names are refused.
        kind: what the media are.
    """

    def __init__(self, files: MediaFiles | None, kind: str) -> None:
        self._files, self._kind = files, kind

    def __call__(self, value: Any) -> Medium:
        """The medium of one cell.

        Raises:
            GraftlineError: the cell is empty, or holds nothing of these.
        """
        name = "medium"
        if isinstance(value, dict) and {"bytes", "path"} & value.keys():
            content, path = value.get("bytes"), value.get("path")
            name = str(path or name)
            value = content if content is not None else path
        if isinstance(value, list) and self._kind == FEATURES:
            value = _encoded(value)
        if isinstance(value, bytes) and value:
            held = value
            return Medium(name, sha256(held).hexdigest(), lambda: held)
        if isinstance(value, str) and self._files is not None:
            return self._files(value)
        if isinstance(value, str):
            raise RowError(
                "names a file and does not hold its bytes; store the bytes, or make it a column of "
                "names, below media_folder"
            )
        raise RowError(f"holds no medium ({type(value).__name__})" if value else "is empty")


def _encoded(value: list[Any]) -> bytes:
    """Lists of numbers, (width,) or (tokens, width), as npy bytes."""
    try:
        array = np.asarray(value, dtype=np.float32)
    except (ValueError, TypeError) as error:
        raise MediaError(f"holds no numbers of one width ({error})") from error
    return encode_features(array.reshape(1, -1) if array.ndim == 1 else array)


class FileSource:
    """Parquet or arrow files.

    Args:
        settings: of the source.
        kind: what the media are, and the column of media if the recipe names none.
        hashes: of files.
    """

    def __init__(self, settings: SourceSettings, kind: str, hashes: FileHashes) -> None:
        self._settings, self._kind, self._hashes = settings, kind, hashes
        self._files = files_of(settings.parquet if settings.parquet else settings.arrow)

    def tables(self) -> list[Path]:
        """The files."""
        return [path for _, path in self._files]

    def names_files(self) -> bool:
        """Whether a column of names stands for the media."""
        return any(self._named(path) for path in self.tables())

    def _named(self, path: Path) -> bool:
        with _readable(path, self._settings):
            found = _schema(path, self._settings)
            media = _columns(str(path), tuple(found.names), self._settings, self._kind).media
            kind = found.field(media).type
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            texts = pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view
            return any(is_text(kind) for is_text in texts)

    def entries(self) -> Iterator[Entry]:
        """Every row in order.

        Raises:
            GraftlineError: a file is damaged or a column is missing.
        """
        for split, path in self._files:
            given = self._settings.media_folder
            folder = Path(given) if given else path.parent
            medium = Held(
                MediaFiles(folder, self._hashes) if self._named(path) else None, self._kind
            )
            with _readable(path, self._settings):
                names = tuple(_schema(path, self._settings).names)
                columns = _columns(str(path), names, self._settings, self._kind)
                batches = _batches(path, self._settings, columns.names)
                yield from _entries(str(path), columns, batches, self._settings, split, medium)


class HubSource:
    """A data set of the hub at one commit; `datasets` fetches it once and maps it into memory.

    Args:
        settings: of the source.
        kind: what the media are, and the column of media if the recipe names none.
        hashes: not needed: the commit says what the data are.
    """

    def __init__(self, settings: SourceSettings, kind: str, hashes: FileHashes) -> None:
        self._settings, self._kind = settings, kind

    def tables(self) -> list[Path]:
        """None: the commit names the files."""
        return []

    def names_files(self) -> bool:
        """The commit says what the media are."""
        return False

    def entries(self) -> Iterator[Entry]:
        """Every row in order, split by split.

        Raises:
            GraftlineError: the data set cannot be had, or a column is missing.
        """
        for split, rows in self._splits().items():
            table = f"{self._settings.hub}@{str(self._settings.revision)[:12]} {split}"
            medium, names = Held(None, self._kind), tuple(rows.column_names)
            columns = _columns(table, names, self._settings, self._kind)
            batches = rows.select_columns(columns.names).with_format("arrow").iter(batch_size=_ROWS)
            try:
                known = split_named(split)
            except RowError as error:
                raise GraftlineError(
                    f"{table}: {error}; take it as parquet files, with a path a split"
                ) from error
            yield from _entries(table, columns, batches, self._settings, known, medium)

    def _splits(self) -> dict[str, Any]:
        import datasets

        settings = self._settings
        try:
            builder = datasets.load_dataset_builder(
                settings.hub, name=settings.config, revision=settings.revision
            )
            # Without a connection `datasets` takes whatever commit lies in its cache.
            if builder.hash != settings.revision:
                raise FileNotFoundError(f"its cache holds another commit, {builder.hash}")
            builder.download_and_prepare()
            found = builder.as_dataset()
        except Exception as error:  # of requests, huggingface_hub, fsspec, pyarrow ...
            raise GraftlineError(
                f"{settings.hub}: the hub's data set cannot be had at {settings.revision} "
                f"({type(error).__name__}: {error}). Check name, config, revision and connection; "
                "nothing is fetched unless you allow it with HF_HUB_OFFLINE=0 in front of the "
                "command; a gated one needs `hf auth login`."
            ) from error
        return {str(name): rows for name, rows in found.items()}


@contextmanager
def _readable(path: Path, settings: SourceSettings) -> Iterator[None]:
    """Names the file that pyarrow complains of."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        raise GraftlineError(
            f"{path}: is not a readable {settings.kind} file ({error}); copy it again"
        ) from error


def _schema(path: Path, settings: SourceSettings) -> Any:
    if settings.parquet is not None:
        return pq.read_schema(path)
    with pa.memory_map(str(path)) as source:
        return _arrow(source).schema


def _batches(path: Path, settings: SourceSettings, names: list[str]) -> Iterator[Any]:
    """Batches of a few rows with the columns that are read."""
    if settings.parquet is not None:
        yield from pq.ParquetFile(path).iter_batches(batch_size=_ROWS, columns=names)
        return
    with pa.memory_map(str(path)) as source:
        reader = _arrow(source)
        count = getattr(reader, "num_record_batches", None)
        found = iter(reader) if count is None else (reader.get_batch(i) for i in range(count))
        for batch in found:
            yield from _parts(batch.select(names))


def _arrow(source: Any) -> Any:
    """A reader of an arrow file; `datasets` writes the other form, the stream."""
    try:
        return pa.ipc.open_file(source)
    except pa.ArrowInvalid:
        source.seek(0)
        return pa.ipc.open_stream(source)


def _parts(batch: Any) -> Iterator[Any]:
    for start in range(0, batch.num_rows, _ROWS):
        yield batch.slice(start, _ROWS)


def _columns(table: str, names: tuple[str, ...], settings: SourceSettings, kind: str) -> Columns:
    """The columns of a columnar table that are read.

    Raises:
        RowError: one is missing; names the table.
    """
    try:
        return columns_of(names, settings.columns, kind)
    except RowError as error:
        raise RowError(f"{table}: {error}") from error


def _entries(
    table: str,
    columns: Columns,
    batches: Iterator[Any],
    settings: SourceSettings,
    split: str | None,
    medium: Held,
) -> Iterator[Entry]:
    number = 0
    for batch in batches:
        for values in batch.to_pylist():
            yield entry_of(f"{table}, row {number}", values, columns, settings, split, medium)
            number += 1
