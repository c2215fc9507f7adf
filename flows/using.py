"""`graftline ask`, `chat` and `export`: what the command line's words mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from graftline.asking.asker import BATCH, Asker
from graftline.asking.bundle import refuse_existing, write_bundle
from graftline.asking.conversation import Shown, Turn, check_question
from graftline.asking.media import Medium
from graftline.asking.table import answer_table, read_questions
from graftline.durable import why_unwritable
from graftline.errors import GraftlineError
from graftline.planning.problems import require_device
from graftline.progress import shown
from tasks.models import card_of, described, find_finished, find_parts, measured_by


def open_model(
    model: str,
    overrides: Mapping[str, Any],
    stage: int | None,
    *,
    device: str,
    max_new_tokens: int | None,
) -> Asker:
    """A model that can be asked; see `tasks.models.find_parts`.

    Raises:
        GraftlineError: the device cannot be used here, or there is no such model.
    """
    require_device(device, "--device")
    return Asker(find_parts(model, overrides, stage), device, max_new_tokens)


def ask(asker: Asker, media: Sequence[tuple[str, Path]], question: str, console: Console) -> str:
    """The answer to one question about media, in the order in which they are given.

    Args:
        asker: the model.
        media: (modality, file).
        question: the text.
        console: for what was done to the media.

    Raises:
        GraftlineError: lists every file that cannot be used, or says what is wrong with the text.
    """
    text = check_question(question)
    given = show(asker, media, console)
    return asker.answer([[Turn(tuple(given), text)]])[0]


def show(asker: Asker, media: Sequence[tuple[str, Path]], console: Console) -> list[Shown]:
    """Reads and encodes media; says on the console what was done to them.

    Raises:
        GraftlineError: lists every file that cannot be used.
    """
    read: list[Medium] = []
    problems: list[str] = []
    for modality, path in media:
        try:
            read.append(asker.read(path, modality))
        except GraftlineError as error:
            problems.append(str(error))
    if problems:
        raise GraftlineError("\n".join(problems))
    for note in (note for medium in read for note in medium.notes):
        console.out(f"note: {note}", style="dim", highlight=False)
    return asker.show(read, [path for _, path in media])


def ask_table(asker: Asker, table: Path, out: Path, console: Console) -> int:
    """Answers every question of a CSV into another; see `graftline.asking.table`.

    Returns:
        How many questions were answered.

    Raises:
        GraftlineError: there is something at `out`, or it cannot be written; or lists every problem
            of the table. Nothing is asked or written then.
    """
    if out.resolve() == table.resolve():
        raise GraftlineError(f"{out}: is the table of questions itself; choose another --out")
    refuse_existing(out)
    folder = out.absolute().parent
    if not folder.is_dir():
        raise GraftlineError(f"{out}: cannot be written; choose a file in a folder that is there")
    if (why := why_unwritable(folder)) is not None:
        raise GraftlineError(f"{out}: cannot be written ({why}); choose another --out")
    with shown(console):
        questions = read_questions(table, asker)
        answer_table(questions, asker, out, BATCH)
    return len(questions.rows)


def export(
    model: str, overrides: Mapping[str, Any], stage: int | None, out: Path, console: Console
) -> str:
    """Writes a finished model into one folder of its own.

    Returns:
        What people read of the model.

    Raises:
        GraftlineError: the model is not finished, or the folder is there or cannot be written.
    """
    refuse_existing(out)
    found = find_finished(model, overrides, stage)
    with shown(console):
        measured = measured_by(found)
        description = described(found, measured)
        cells = measured.cells if measured is not None else ()
        write_bundle(found.parts, description, card_of(description, measured), out, cells)
    return found.parts.name
