"""A source into rows: read twice, texts first, then media one by one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Protocol

from graftline.data.files import FileHashes
from graftline.data.kinds import FEATURES
from graftline.data.rows import SPLITS, MediaError
from graftline.data.sources.columnar import FileSource, HubSource
from graftline.data.sources.entries import Entry
from graftline.data.sources.fitting import fit_medium
from graftline.data.sources.placing import Placed, Texts, place
from graftline.data.sources.tables import ConversationSource, FolderSource
from graftline.data.sources.writing import RowsWriter
from graftline.errors import GraftlineError
from graftline.settings.sources import SourceSettings
from graftline.step_code import source_digest

Progress = Callable[[str, int, int], None]
CODE = ("data/rows.py", "data/kinds.py", "data/wav.py", "data/encoding.py", "data/sources/*.py")
"""What the rows depend on besides the source itself."""


class Source(Protocol):
    """Anything that gives rows."""

    def tables(self) -> list[Path]:
        """The files that hold the texts (and perhaps the media)."""
        ...

    def names_files(self) -> bool:
        """Whether media lie in files of their own, which the tables name."""
        ...

    def entries(self) -> Iterator[Entry]:
        """Every row in order; asked for twice."""
        ...


@dataclass(frozen=True)
class Request:
    """What is to be imported.

    Attributes:
        modality: its name, for the rows' ids.
        kind: what the media are.
        settings: where they come from.
    """

    modality: str
    kind: str
    settings: SourceSettings


@dataclass(frozen=True)
class Imported:
    """What an import found.

    Attributes:
        identity: of source, settings and code; what it was before any medium was decoded.
        counts: split -> task -> rows.
        problems: `file, row: what`, each; with `bad_rows: skip` they are among the warnings.
        warnings: what does not stand in the way.
    """

    identity: str
    counts: dict[str, dict[str, int]]
    problems: tuple[str, ...]
    warnings: tuple[str, ...]


SOURCES: dict[str, Callable[[SourceSettings, str, FileHashes], Source]] = {
    "folder": FolderSource,
    "parquet": FileSource,
    "arrow": FileSource,
    "hub": HubSource,
    "conversations": ConversationSource,
}


def identity_of(request: Request, hashes: FileHashes) -> str:
    """What an import depends on: source, settings and code; no medium is decoded.

    Raises:
        GraftlineError: a table cannot be read at all.
    """
    source = SOURCES[request.settings.kind](request.settings, request.kind, hashes)
    digest = sha256()
    for table in source.tables():
        try:
            digest.update(f"{table.name} {hashes.sha256(table)}\n".encode())
        except MediaError as error:
            raise GraftlineError(f"{table}: {error}") from error
    for entry in source.entries() if source.names_files() else ():
        digest.update(f"{entry.medium.digest if entry.medium else None}\n".encode())
    hashes.save()
    about = {
        "modality": request.modality,
        "kind": request.kind,
        "settings": request.settings.model_dump(mode="json"),
        "source": digest.hexdigest(),
        "code": source_digest(*CODE),
    }
    return sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _read_texts(request: Request, hashes: FileHashes) -> tuple[Texts, list[str]]:
    """The first reading: the good rows' texts, and every problem by file and row."""
    source = SOURCES[request.settings.kind](request.settings, request.kind, hashes)
    texts, problems = Texts(), []
    for number, entry in enumerate(source.entries()):
        problems += [f"{entry.place}: {problem}" for problem in entry.problems]
        if not entry.problems:
            texts.add(number, entry)
    return texts, problems


def import_rows(
    request: Request, folder: Path, hashes: FileHashes, progress: Progress | None = None
) -> Imported:
    """Writes the rows of a source as `<split>.parquet`, and finds everything that is wrong.

    Rows that are wrong are left out; so the files are whole even where there are problems, and
    whoever publishes them looks at the problems first.

    Args:
        request: what is to be imported.
        folder: where to; it is there and empty.
        hashes: of files.
        progress: called after each row of the source.

    Raises:
        GraftlineError: a table cannot be read at all, or there are too few media for three splits.
    """
    identity = identity_of(request, hashes)
    texts, problems = _read_texts(request, hashes)
    table = texts.table()
    try:
        placed = place(table, request.settings.fractions)
    except GraftlineError as error:
        raise GraftlineError("\n  ".join([f"{request.modality}: {error}", *problems])) from error
    total = int(table["entry"].max()) + 1 if len(table) else 0
    with RowsWriter(folder, request.modality) as writer:
        problems += _write(request, placed, writer, hashes, total, progress)
    skip = request.settings.bad_rows == "skip"
    warnings = [*placed.warnings, *(f"left out: {each}" for each in problems if skip)]
    stopping = [*([] if skip else problems), *placed.problems]
    if not stopping:
        empty = [split for split in SPLITS if not writer.counts[split]]
        stopping = [f"{request.modality}: the split {split} has no good row" for split in empty]
    if identity_of(request, hashes) != identity:
        raise GraftlineError(
            f"{request.modality}: its files changed while they were read; run it again"
        )
    return Imported(identity, writer.counts, tuple(stopping), tuple(warnings))


def _write(
    request: Request,
    placed: Placed,
    writer: RowsWriter,
    hashes: FileHashes,
    total: int,
    progress: Progress | None,
) -> list[str]:
    """The second reading: media, each decoded once; returns what is wrong with them."""
    source = SOURCES[request.settings.kind](request.settings, request.kind, hashes)
    problems: list[str] = []
    width, where = 0, ""
    for number, entry in enumerate(source.entries()):
        rows = placed.rows.get(number)
        if rows and entry.medium is not None:
            try:
                media, values = fit_medium(entry.medium.read(), request.kind, request.settings)
                if request.kind == FEATURES:
                    width, where = width or values.shape[1], where or entry.place
                    _check_width(values.shape[1], width, where)
            except MediaError as error:
                problems.append(f"{entry.place}: {entry.medium.name}: {error}")
                continue
            for split, task, question, answers, origin in rows:
                writer.add(split, media, task, question, answers, origin)
        if progress is not None and number < total:
            progress(f"import {request.modality}", number + 1, total)
    return problems


def _check_width(found: int, first: int, where: str) -> None:
    if found != first:
        raise MediaError(f"has the width {found}, the first row ({where}) {first}; all need one")
