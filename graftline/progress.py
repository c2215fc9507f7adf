"""Progress bars: what is done, how far, how long. Silent until somebody shows them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
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


class _Relay(Progress):
    """Bars that are shown in another process."""

    def __init__(self, say: Callable[[Mapping[str, Any]], None]) -> None:
        super().__init__(disable=True)
        self._say = say

    def add_task(self, description: str, *_: Any, **fields: Any) -> TaskID:
        """Says that a bar begins."""
        self._say({"bar": description, "total": fields["total"], "done": fields["completed"]})
        return TaskID(0)

    def update(self, task_id: TaskID, **fields: Any) -> None:
        """Says that rounds are done."""
        self._say({"rounds": fields["advance"], "note": fields["note"]})

    def stop_task(self, task_id: TaskID) -> None:
        """A bar that has all of its rounds is finished."""


@contextmanager
def relayed(say: Callable[[Mapping[str, Any]], None]) -> Iterator[None]:
    """Says how loops go on, instead of showing it: plain data for another process's `replayed`."""
    relay = _Relay(say)
    _shown.append(relay)
    try:
        yield
    finally:
        _shown.remove(relay)


@contextmanager
def replayed() -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Shows what another process says of its loops, one after another.

    Yields:
        Takes what `relayed` gave.
    """
    with ExitStack() as bars:
        advance: list[Advance] = []

        def take(said: Mapping[str, Any]) -> None:
            if "bar" in said:
                bars.close()
                advance[:] = [bars.enter_context(track(said["bar"], said["total"], said["done"]))]
            else:
                advance[0](said["note"], said["rounds"])

        yield take


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
