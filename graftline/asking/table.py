"""Questions in a CSV: read and checked row by row before anything is computed."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import torch

from graftline.asking.asker import Asker
from graftline.asking.conversation import Shown, Turn, check_question
from graftline.data.files import inside, open_text
from graftline.durable import atomic_write_text
from graftline.errors import GraftlineError
from graftline.evaluation.cells import csv_text
from graftline.progress import Advance, track
from graftline.recipe import KINDS

QUESTION, ANSWER = "question", "answer"
_LONGEST_LIST = 50
_SORTED = 8
"""Batches whose rows are held in memory together, and answered in the order of their lengths."""


@dataclass(frozen=True)
class AskedRow:
    """One question of a table.

    Attributes:
        media: (modality, file) in the order of the columns.
        question: the text.
    """

    media: tuple[tuple[str, Path], ...]
    question: str


@dataclass(frozen=True)
class QuestionTable:
    """A table of questions.

    Attributes:
        columns: as in the file.
        cells: the rows as they stand in the file, blank lines left out.
        rows: what they ask.
    """

    columns: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]
    rows: tuple[AskedRow, ...]


def read_questions(path: Path, asker: Asker) -> QuestionTable:
    """Reads a CSV with a column `question` and one a modality with files beside it.

    Every media file is decoded once here, so that nothing is computed before all of them are
    known to be usable.

    Args:
        path: the CSV, UTF-8; media paths are relative to its folder and stay inside it.
        asker: the model that will be asked.

    Raises:
        GraftlineError: lists every problem by the line in which its row ends.
    """
    columns, lines = _lines(path)
    if QUESTION not in columns:
        raise GraftlineError(
            f"{path}: has no column `question` (it has: {', '.join(columns) or 'none'}); add one"
        )
    if ANSWER in columns:
        raise GraftlineError(f"{path}: has a column `answer` already; rename or remove it")
    for name in columns:
        near = get_close_matches(name, [*KINDS, *asker.modalities], 1, cutoff=0.8)
        if near and not asker.shows(name):
            raise GraftlineError(
                f"{path}: the column {name!r} would only be copied; if it names media, call it "
                f"{near[0]!r}, else by a word that is less like it"
            )
    if not lines:
        raise GraftlineError(f"{path}: has no rows below its header")
    rows: list[AskedRow] = []
    problems: list[str] = []
    with track(f"check {path.name}", len(lines)) as advance:
        for number, fields in lines:
            found, wrong = _row(path.parent, columns, fields, asker)
            problems += [f"line {number}: {each}" for each in wrong]
            rows.append(found)
            advance("")
    if problems:
        listed = problems[:_LONGEST_LIST]
        if len(problems) > _LONGEST_LIST:
            listed.append(f"... and {len(problems) - _LONGEST_LIST} more")
        raise GraftlineError(
            f"{path}: {len(problems)} problem(s); nothing was asked:\n  " + "\n  ".join(listed)
        )
    return QuestionTable(columns, tuple(fields for _, fields in lines), tuple(rows))


def _lines(path: Path) -> tuple[tuple[str, ...], list[tuple[int, tuple[str, ...]]]]:
    """The header, and (line of the file, fields) of each row."""
    try:
        with open_text(path, newline="") as stream:
            reader = csv.reader(stream, strict=True)
            header, *lines = [(reader.line_num, tuple(line)) for line in reader if line]
    except ValueError as error:
        raise GraftlineError(f"{path}: is empty; it needs a header and rows") from error
    columns = tuple(name.strip() for name in header[1])
    repeated = sorted({name for name in columns if columns.count(name) > 1})
    if repeated:
        raise GraftlineError(f"{path}: names the column {', '.join(repeated)} more than once")
    return columns, lines


def _row(
    folder: Path, columns: Sequence[str], fields: Sequence[str], asker: Asker
) -> tuple[AskedRow, list[str]]:
    """One row, and what is wrong with it."""
    if len(fields) != len(columns):
        return AskedRow((), ""), [f"has {len(fields)} fields, the header {len(columns)}"]
    problems: list[str] = []
    media: list[tuple[str, Path]] = []
    question = ""
    for name, value in zip(columns, fields, strict=True):
        try:
            if name == QUESTION:
                question = check_question(value)
            elif asker.shows(name) and value.strip():
                file = inside(folder, value.strip())
                asker.read(file, name)
                media.append((name, file))
        except GraftlineError as error:
            problems.append(str(error))
    if not problems:
        try:
            asker.encode([_turn(asker, media, question)])
        except GraftlineError as error:
            problems.append(str(error))
    return AskedRow(tuple(media), question), problems


def _turn(asker: Asker, media: Sequence[tuple[str, Path]], question: str) -> Turn:
    """A question whose media are not encoded yet: as long as it will be."""
    nothing = torch.empty(0)
    return Turn(tuple(Shown(asker.called(name), nothing) for name, _ in media), question)


def answer_table(table: QuestionTable, asker: Asker, out: Path, batch: int) -> None:
    """Asks all questions and writes the table with a column `answer`, whole or not at all.

    Args:
        table: from `read_questions`.
        asker: the same model.
        out: the CSV to write.
        batch: questions that are encoded, and answered, together.
    """
    answers: list[str] = []
    for start in range(0, len(table.rows), _SORTED * batch):
        rows = table.rows[start : start + _SORTED * batch]
        which = f"{start + 1} to {start + len(rows)} of {len(table.rows)}"
        with track(f"encode {which}", len(rows)) as advance:
            conversations = _conversations(rows, asker, batch, advance)
        answers += asker.answer(conversations, label=f"answer {which}", batch=batch)
    answered = ([*fields, text] for fields, text in zip(table.cells, answers, strict=True))
    atomic_write_text(out, csv_text([*table.columns, ANSWER], answered))


def _conversations(
    rows: Sequence[AskedRow], asker: Asker, batch: int, advance: Advance
) -> list[list[Turn]]:
    """Rows with their media encoded, so many at a time."""
    found: list[list[Turn]] = []
    for start in range(0, len(rows), batch):
        some = rows[start : start + batch]
        given = [pair for row in some for pair in row.media]
        media = [asker.read(path, name) for name, path in given]
        shown = iter(asker.show(media, [path for _, path in given]))
        for row in some:
            own = tuple(next(shown) for _ in row.media)
            found.append([Turn(own, row.question)])
        advance("", len(some))
    return found
