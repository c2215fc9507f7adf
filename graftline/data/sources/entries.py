"""One row of a source as all sources give it: a medium, its texts, where it stands."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from graftline.errors import GraftlineError
from graftline.settings.sources import ColumnSettings, SourceSettings

_SPLITS = {
    "train": "train", "training": "train", "restval": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test",
}  # fmt: skip
"""What data sets call their splits (`restval` is Karpathy's, of COCO)."""


class RowError(GraftlineError):
    """What is wrong with one row of a source."""


@dataclass(frozen=True)
class Text:
    """What is asked about a medium, and what may be answered."""

    task: str
    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Medium:
    """A medium that is not read yet.

    Attributes:
        name: what messages call it.
        digest: sha256 of its bytes.
        read: gives the bytes.
    """

    name: str
    digest: str
    read: Callable[[], bytes]


@dataclass(frozen=True)
class Entry:
    """One row of a source.

    Attributes:
        place: file and row, for messages.
        split: train, validation or test; None where it is to be drawn.
        texts: what is asked about the medium.
        group: what keeps rows together in one split, besides their medium.
        medium: None where it cannot be used.
        problems: why the row cannot be used.
    """

    place: str
    split: str | None
    texts: tuple[Text, ...] = ()
    group: str | None = None
    medium: Medium | None = None
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Columns:
    """The columns of a table that are read."""

    media: str
    question: str | None
    answers: tuple[str, ...]
    captions: tuple[str, ...]
    split: str | None
    group: str | None

    @property
    def names(self) -> list[str]:
        """All of them, each once."""
        single = [self.media, self.question, self.split, self.group]
        named = [name for name in single if name is not None]
        return list(dict.fromkeys([*named, *self.answers, *self.captions]))


@lru_cache(maxsize=256)
def columns_of(available: tuple[str, ...], given: ColumnSettings, media: str) -> Columns:
    """Finds the columns that a recipe names, or that are called as usual.

    Args:
        available: the table's columns.
        given: the names that the recipe says.
        media: what the column of media is called if the recipe does not say.

    Raises:
        RowError: a column is missing; says which there are.
    """
    problems: list[str] = []

    def one(name: str | None, usual: str | None = None) -> str | None:
        if name is None:
            return usual if usual in available else None
        if name not in available:
            problems.append(f"column `{name}` is missing")
        return name

    def several(names: str | Sequence[str] | None, usual: Sequence[str]) -> tuple[str, ...]:
        if names is None:
            return tuple(name for name in usual if name in available)[:1]
        listed = (names,) if isinstance(names, str) else tuple(names)
        problems.extend(f"column `{each}` is missing" for each in listed if each not in available)
        return listed

    found = Columns(
        media=one(given.media or media) or media,
        question=one(given.question, "question"),
        answers=several(given.answer, ("answer", "answers")),
        captions=several(given.caption, ("caption", "captions")),
        split=one(given.split, "split"),
        group=one(given.group),
    )
    if not found.answers and not found.captions:
        problems.append("column `answer` or `caption` is missing")
    if problems:
        there = ", ".join(available) or "none"
        raise RowError(
            f"{'; '.join(problems)} (there are: {there}); name it under `columns` in the recipe"
        )
    return found


def entry_of(
    place: str,
    values: Mapping[str, Any],
    columns: Columns,
    settings: SourceSettings,
    split: str | None,
    medium: Callable[[Any], Medium],
) -> Entry:
    """One row of a table, with everything that is wrong with it.

    Args:
        place: file and row.
        values: the row.
        columns: where what is.
        settings: of the source.
        split: whose file it is; None where the row may say it.
        medium: finds the medium that the row names or holds.
    """
    problems: list[str] = []
    texts: tuple[Text, ...] = ()
    found: Medium | None = None
    try:
        if split is None and columns.split is not None:
            split = split_named(values.get(columns.split))
    except RowError as error:
        problems.append(str(error))
    try:
        texts = _texts(values, columns, settings)
    except RowError as error:
        problems.append(str(error))
    try:
        found = medium(values.get(columns.media))
    except GraftlineError as error:
        problems.append(str(error))
    group = values.get(columns.group) if columns.group else None
    if columns.group and group in (None, ""):
        problems.append(f"`{columns.group}` is empty")
    named = None if group is None else str(group)
    return Entry(place, split, texts, named, found, tuple(problems))


def split_named(value: Any) -> str | None:
    """The split that a row names; None where it names none.

    Raises:
        RowError: it names another.
    """
    if value is None or not str(value).strip():
        return None
    found = _SPLITS.get(str(value).strip().lower())
    if found is None:
        raise RowError(f"unknown split {value!r}; known are train, validation (val, dev) and test")
    return found


def _texts(
    values: Mapping[str, Any], columns: Columns, settings: SourceSettings
) -> tuple[Text, ...]:
    answers = _all(values, columns.answers)
    captions = _all(values, columns.captions)
    if not answers and not captions:
        raise RowError("has neither an answer nor a caption")
    given = values.get(columns.question) if columns.question else None
    asked = checked_text(given, "question") if given not in (None, "") else None
    texts = []
    if answers:
        question = asked or settings.question
        if question is None:
            raise RowError(
                "has an answer and no question; add a column `question`, or `question` to the "
                "recipe's data, which is asked of every such row"
            )
        texts.append(Text("question", question, answers))
    if captions:
        question = asked if asked and not answers else settings.caption_question
        texts.append(Text("caption", question, captions))
    return tuple(texts)


def _all(values: Mapping[str, Any], names: Sequence[str]) -> tuple[str, ...]:
    """The texts of several columns, each of which may hold one or a list, without repeats."""
    found: list[str] = []
    for name in names:
        value = values.get(name)
        listed = value if isinstance(value, list | tuple) else [value]
        found += [checked_text(each, name) for each in listed if each not in (None, "")]
    return tuple(dict.fromkeys(found))


def checked_text(value: Any, name: str) -> str:
    """A text without the white space around it; what it says is never looked at.

    Raises:
        RowError: it is blank, no text or number, or no valid Unicode.
    """
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RowError(f"`{name}` is {type(value).__name__}, not a text")
    if isinstance(value, float) and math.isnan(value):
        raise RowError(f"`{name}` is NaN")
    text = str(value).strip()
    if not text:
        raise RowError(f"`{name}` is empty")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(f"`{name}` is not valid Unicode ({error.reason})") from error
    return text
