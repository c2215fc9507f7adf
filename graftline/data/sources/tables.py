"""Sources that are tables with file names: metadata.csv, metadata.jsonl, LLaVA's conversations."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from graftline.data.files import FileHashes, inside, open_text, read_file
from graftline.data.rows import MediaError
from graftline.data.sources.entries import (
    Entry,
    Medium,
    RowError,
    Text,
    checked_text,
    columns_of,
    entry_of,
    split_named,
)
from graftline.errors import GraftlineError
from graftline.settings.sources import Paths, SourceSettings, SplitPaths

METADATA = ("metadata.csv", "metadata.jsonl")
FILE_NAME = "file_name"
_ROLES = {"human": "human", "user": "human", "gpt": "model", "assistant": "model"}
_MARKS = {"image": ("<image>",), "audio": ("<audio>", "<sound>"), "video": ("<video>",),
          "point_cloud": ("<point>", "<point_cloud>"), "features": ("<features>",)}  # fmt: skip


def files_of(paths: SplitPaths | None) -> list[tuple[str | None, Path]]:
    """(split, path) of what a recipe names; `*` stands for any name, in sorted order.

    Raises:
        GraftlineError: there is no such file or folder, or a pattern is none.
    """
    found: list[tuple[str | None, Path]] = []
    if isinstance(paths, dict):
        for split, listed in paths.items():
            found += [(split, path) for path in _expanded(listed)]
    else:
        found += [(None, path) for path in _expanded(paths or ())]
    return found


def _expanded(paths: Paths) -> list[Path]:
    found = []
    for text in (paths,) if isinstance(paths, str) else paths:
        given = Path(text)
        if wrong := next((part for part in given.parts if "**" in part and part != "**"), None):
            right = text.replace(wrong, f"**/{re.sub(r'[*]+', '*', wrong)}")
            raise GraftlineError(f"{text}: ** stands for folders and alone; write {right}")
        pattern = str(given.relative_to(given.anchor)) if given.anchor else text
        matched = sorted(Path(given.anchor or ".").glob(pattern)) if "*" in text else [given]
        if not matched or not matched[0].exists():
            raise GraftlineError(f"{text}: there is no such file or folder")
        found += matched
    return found


class MediaFiles:
    """Media that a table names by their files.

    Args:
        folder: what the names are relative to.
        hashes: of files.
    """

    def __init__(self, folder: Path, hashes: FileHashes) -> None:
        self._folder, self._hashes = folder, hashes

    def __call__(self, name: Any) -> Medium:
        """The medium of a file's name.

        Raises:
            GraftlineError: the name is missing or leads out of the folder, or the file cannot be
                used.
        """
        if not isinstance(name, str) or not name.strip():
            raise RowError("names no file")
        path = inside(self._folder, name)
        try:
            digest = self._hashes.sha256(path)
        except MediaError as error:
            raise MediaError(f"{name}: {error}") from error
        return Medium(name, digest, lambda: read_file(path))


class FolderSource:
    """Folders of media with a metadata.csv or metadata.jsonl, as `datasets` reads them too.

    Args:
        settings: of the source.
        kind: what the media are.
        hashes: of files.
    """

    def __init__(self, settings: SourceSettings, kind: str, hashes: FileHashes) -> None:
        self._settings, self._hashes = settings, hashes
        self._folders = files_of(settings.folder)

    def tables(self) -> list[Path]:
        """The files that hold the texts.

        Raises:
            GraftlineError: a folder has none of them, or both.
        """
        return [_metadata(folder) for _, folder in self._folders]

    def names_files(self) -> bool:
        """Media are files of their own."""
        return True

    def entries(self) -> Iterator[Entry]:
        """Every row in order.

        Raises:
            GraftlineError: a table cannot be read, or a column is missing.
        """
        for (split, _), table in zip(self._folders, self.tables(), strict=True):
            given = self._settings.media_folder
            medium = MediaFiles(Path(given) if given else table.parent, self._hashes)
            lines = _csv_lines(table) if table.suffix == ".csv" else json_lines(table)
            for number, values in lines:
                place = f"{table}, line {number}"
                if isinstance(values, RowError):
                    yield Entry(place, split, problems=(str(values),))
                    continue
                try:
                    columns = columns_of(tuple(values), self._settings.columns, FILE_NAME)
                except RowError as error:
                    if table.suffix == ".csv":  # so it is in every row
                        raise RowError(f"{table}: {error}") from error
                    yield Entry(place, split, problems=(str(error),))
                    continue
                yield entry_of(place, values, columns, self._settings, split, medium)


def _metadata(folder: Path) -> Path:
    if not folder.is_dir():
        raise GraftlineError(f"{folder}: is no folder")
    found = [folder / name for name in METADATA if (folder / name).is_file()]
    if len(found) != 1:
        which = "both" if found else "neither"
        raise GraftlineError(f"{folder}: holds {which} of {' and '.join(METADATA)}; it needs one")
    return found[0]


def _csv_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
    """(line of the file in which it ends, row) of each row of a CSV."""
    with open_text(path, newline="") as stream:
        reader = csv.reader(stream, strict=True)
        header = [name.strip() for name in next(reader, [])]
        if not header:
            raise GraftlineError(f"{path}: is empty; it needs a header and rows")
        repeated = sorted({name for name in header if header.count(name) > 1})
        if repeated:
            raise GraftlineError(f"{path}: names the column {', '.join(repeated)} twice")
        for fields in reader:
            if len(fields) == len(header):
                yield reader.line_num, dict(zip(header, fields, strict=True))
            elif fields:
                wrong = RowError(f"has {len(fields)} fields, the header {len(header)}")
                yield reader.line_num, wrong


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
    """(line, object) of each line of a file of JSON lines."""
    with open_text(path) as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield number, _object(line)


def _object(line: str) -> dict[str, Any] | RowError:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        return RowError(f"is not JSON ({error})")
    return content if isinstance(content, dict) else RowError("is no JSON object")


class ConversationSource:
    """LLaVA's conversations: an object a medium, with turns of `human` and `gpt`.

    Every pair of turns becomes a row of its own that shows the medium [ours]; `<image>` and its
    like are taken out, since the medium stands before the question anyway. Objects without a
    medium are text alone: they are left out.

    Args:
        settings: of the source.
        kind: what the media are, and the key that names them.
        hashes: of files.
    """

    def __init__(self, settings: SourceSettings, kind: str, hashes: FileHashes) -> None:
        self._settings, self._kind, self._hashes = settings, kind, hashes
        self._key = settings.columns.media or kind
        self._files = files_of(settings.conversations)

    def tables(self) -> list[Path]:
        """The files that hold the texts."""
        return [path for _, path in self._files]

    def names_files(self) -> bool:
        """Media are files of their own."""
        return True

    def entries(self) -> Iterator[Entry]:
        """Every object that has a medium, in order.

        Raises:
            GraftlineError: a file is no JSON, or none of its objects has a medium.
        """
        for split, path in self._files:
            given = self._settings.media_folder
            medium = MediaFiles(Path(given) if given else path.parent, self._hashes)
            shown = False
            for place, values in _objects(path):
                if isinstance(values, RowError):
                    yield Entry(place, split, problems=(str(values),))
                elif self._key in values:
                    shown = True
                    yield self._entry(place, values, split, medium)
            if not shown:
                raise GraftlineError(
                    f"{path}: no object has the key `{self._key}`; name the right one as "
                    "`columns: {media: ...}`"
                )

    def _entry(
        self, place: str, values: Mapping[str, Any], split: str | None, medium: MediaFiles
    ) -> Entry:
        problems: list[str] = []
        found: Medium | None = None
        texts: tuple[Text, ...] = ()
        named = values[self._key]
        if isinstance(named, list) and len(named) == 1:
            named = named[0]
        try:
            found = medium(named)
        except GraftlineError as error:
            problems.append(str(error))
        group: str | None = None
        try:
            texts = self._texts(values.get("conversations"))
            if split is None and self._settings.columns.split:
                split = split_named(values.get(self._settings.columns.split))
            if self._settings.columns.group:
                group = checked_text(values.get(self._settings.columns.group), "group")
        except RowError as error:
            problems.append(str(error))
        return Entry(place, split, texts, group, found, tuple(problems))

    def _texts(self, turns: Any) -> tuple[Text, ...]:
        if not isinstance(turns, list) or not turns:
            raise RowError("has no list `conversations`")
        spoken = [self._turn(turn) for turn in turns]
        roles = [role for role, _ in spoken]
        if roles != ["human", "model"] * (len(roles) // 2) or not roles:
            raise RowError("`conversations` are not turns of human and gpt, one after the other")
        if sum(marks for _, (marks, _) in spoken) > 1:
            raise RowError("shows more than one medium; a row holds one")
        texts = [text for _, (_, text) in spoken]
        pairs = zip(texts[::2], texts[1::2], strict=True)
        return tuple(Text("question", asked, (said,)) for asked, said in pairs)

    def _turn(self, turn: Any) -> tuple[str, tuple[int, str]]:
        """(who, (how many media it shows, what it says))."""
        if not isinstance(turn, dict):
            raise RowError("has a turn that is no object")
        role = _ROLES.get(str(turn.get("from", turn.get("role"))))
        if role is None:
            raise RowError(f"has a turn of {turn.get('from')!r}; known are human and gpt")
        text = turn.get("value", turn.get("content"))
        count = 0
        if role == "human" and isinstance(text, str):
            for mark in _MARKS[self._kind]:
                count += text.count(mark)
                text = text.replace(mark, " ")
            text = text if text.strip() or not count else self._settings.caption_question
        return role, (count, checked_text(text, "value"))


def _objects(path: Path) -> Iterator[tuple[str, dict[str, Any] | RowError]]:
    if path.suffix == ".jsonl":
        for number, values in json_lines(path):
            yield f"{path}, line {number}", values
        return
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise GraftlineError(f"{path}: is not readable JSON ({error})") from error
    if not isinstance(content, Sequence) or isinstance(content, str):
        raise GraftlineError(f"{path}: is no list of conversations")
    for number, values in enumerate(content):
        known = isinstance(values, dict)
        yield f"{path}, row {number}", values if known else RowError("is no JSON object")
