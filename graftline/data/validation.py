"""Find everything that is wrong with a data folder, before any training starts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from graftline.data.kinds import check_size, decode_media, kinds_of
from graftline.data.parts import Progress
from graftline.data.rows import COLUMNS, MODALITIES, SPLITS, TASKS, column_problems, split_file
from graftline.data.streaming import open_parquet
from graftline.errors import GraftlineError

_LONGEST_LIST = 50


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with the data.

    Attributes:
        file: Path of the parquet file.
        row: Number of the row, counted from 0; None when the whole file is concerned.
        message: What is wrong.
    """

    file: str
    row: int | None
    message: str

    def __str__(self) -> str:
        """Return the problem behind its file and row."""
        place = self.file if self.row is None else f"{self.file}, row {self.row}"
        return f"{place}: {self.message}"


@dataclass
class _Seen:
    """Where each id, media and source was first seen: file, row and split."""

    ids: dict[str, tuple[str, int]] = field(default_factory=dict)
    media: dict[bytes, tuple[str, int, str]] = field(default_factory=dict)
    sources: dict[str, tuple[str, int, str]] = field(default_factory=dict)


def validate(
    folder: Path,
    modalities: Mapping[str, str] | Sequence[str] = MODALITIES,
    progress: Progress | None = None,
) -> list[Problem]:
    """List all problems of a data folder.

    Checked are files, columns, every field of every row, that each media can be decoded and is
    not absurdly small or large, that ids are unique, and that no media and no source serves
    two splits (of any modality).

    Args:
        folder: The data folder.
        modalities: The modalities to look at; with what their rows hold where that is not their
            name.
        progress: Called after each file.

    Returns:
        The problems in the order of files and rows; empty when all is well.
    """
    problems: list[Problem] = []
    seen = _Seen()
    files = [(name, kind, split) for name, kind in kinds_of(modalities).items() for split in SPLITS]
    for done, (modality, kind, split) in enumerate(files):
        if progress is not None:
            progress(f"validate {modality}/{split}", done, len(files))
        path = split_file(folder, modality, split)
        problems += _file_problems(path, kind, split, seen)
    if progress is not None:
        progress("validate", len(files), len(files))
    return problems


def require_valid(
    folder: Path,
    modalities: Mapping[str, str] | Sequence[str] = MODALITIES,
    progress: Progress | None = None,
) -> None:
    """Stop when a data folder has problems; see `validate`.

    Raises:
        GraftlineError: Lists the problems by file and row.
    """
    problems = validate(folder, modalities, progress)
    if problems:
        lines = [str(problem) for problem in problems[:_LONGEST_LIST]]
        if len(problems) > _LONGEST_LIST:
            lines.append(f"... and {len(problems) - _LONGEST_LIST} more")
        starters = {Path(problem.file).parent.name for problem in problems} <= set(MODALITIES)
        rebuild = f"graftline data build --folder {folder} --force"
        raise GraftlineError(
            f"the data in {folder} have {len(problems)} problem(s); mend these rows"
            + (f", or rebuild the starter's data with `{rebuild}`" if starters else "")
            + ":\n  "
            + "\n  ".join(lines)
        )


def _file_problems(path: Path, kind: str, split: str, seen: _Seen) -> list[Problem]:
    """Return the problems of one parquet file."""
    name = str(path)
    try:
        file = open_parquet(path)
    except GraftlineError as error:
        return [Problem(name, None, str(error).removeprefix(f"{name} "))]
    columns = column_problems(file.schema_arrow.empty_table())
    if columns:
        return [Problem(name, None, message) for message in columns]
    if file.metadata.num_rows == 0:
        return [Problem(name, None, "has no rows")]
    problems = []
    number = 0
    try:
        for batch in file.iter_batches(batch_size=64, columns=list(COLUMNS)):
            for row in batch.to_pylist():
                messages = [*_field_problems(row), *_media_problems(row["media"], kind)]
                messages += _repeat_problems(row, seen, name, number, split)
                problems += [Problem(name, number, message) for message in messages]
                number += 1
    except (pa.ArrowException, OSError, ValueError) as error:
        problems.append(Problem(name, number, f"cannot be read from here on ({error})"))
    return problems


def _field_problems(row: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the texts of a row."""
    problems = [
        f"`{name}` is empty" for name in ("id", "question", "source") if _is_blank(row[name])
    ]
    if row["task"] not in TASKS:
        problems.append(f"unknown task {row['task']!r}; known are {', '.join(TASKS)}")
    answers = row["answers"]
    if not answers:
        problems.append("`answers` is empty")
    elif any(_is_blank(answer) for answer in answers):
        problems.append("`answers` holds an empty answer")
    return problems


def _is_blank(text: str | None) -> bool:
    return text is None or not text.strip()


def _media_problems(media: bytes | None, kind: str) -> list[str]:
    """Return why a media cannot be used, by decoding it once."""
    if not media:
        return ["`media` is empty"]
    try:
        values = decode_media(media, kind)
    except GraftlineError as error:
        return [f"`media` cannot be decoded: {error}"]
    try:
        check_size(values, kind)
    except GraftlineError as error:
        return [f"`media` {error}"]
    return []


def _repeat_problems(
    row: Mapping[str, Any], seen: _Seen, file: str, number: int, split: str
) -> list[str]:
    """Return what of a row was seen before where it must not be, and remember the row."""
    problems = []
    if not _is_blank(row["id"]):
        first = seen.ids.setdefault(row["id"], (file, number))
        if first != (file, number):
            problems.append(f"the id {row['id']!r} is also in {first[0]}, row {first[1]}")
    here = (file, number, split)
    if row["media"]:
        where = seen.media.setdefault(hashlib.sha256(row["media"]).digest(), here)
        if where[2] != split:
            problems.append(f"the same media is also in {where[0]}, row {where[1]}")
    if not _is_blank(row["source"]):
        where = seen.sources.setdefault(row["source"], here)
        if where[2] != split:
            problems.append(f"the source {row['source']!r} also serves {where[0]}, row {where[1]}")
    return problems
