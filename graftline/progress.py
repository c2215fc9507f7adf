"""Progress bars: what is done, how far, how long. Silent until somebody shows them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Advance(Protocol):
    """Reports rounds that are done."""

    def __call__(self, note: str = "", rounds: int = 1) -> None:
        """Reports `rounds` more rounds, and says `note` beside the bar."""


_shown: list[Progress] = []


@contextmanager
def shown(console: Console) -> Iterator[None]:
    """Shows the bars of everything that runs inside, in this process and all its threads."""
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[note]}"),
        console=console,
        transient=False,
    )
    with progress:
        _shown.append(progress)
        try:
            yield
        finally:
            _shown.remove(progress)


@contextmanager
def track(label: str, total: int, done: int = 0) -> Iterator[Advance]:
    """Reports a loop of `total` rounds, of which `done` were made earlier.

    Yields:
        A function to call after each round with a short note (may be empty).
    """
    if not _shown:
        yield lambda note="", rounds=1: None
        return
    progress = _shown[-1]
    task = progress.add_task(label, total=total, completed=done, note="")

    def advance(note: str = "", rounds: int = 1) -> None:
        progress.update(task, advance=rounds, note=note)

    try:
        yield advance
    finally:
        progress.stop_task(task)
