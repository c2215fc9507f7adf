"""Stopping on SIGINT and SIGTERM: say so, close the books, exit.

Nothing is unwound. What lies on disk survives SIGKILL, so it survives this; and a thread that
computes in C could not be unwound soon, while whoever sent the signal waits.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

MESSAGE = (
    "Stopped. Nothing half made stands under its name; the same command goes on from what is "
    "finished."
)
_BOOKS_SECONDS = 10.0
_SHOW_CURSOR = "\x1b[?25h"
_books: list[Callable[[], object]] = []
_stopping = threading.Event()


def stop_on_signals() -> None:
    """Makes SIGINT and SIGTERM end this process with exit code 128 + signal, from now on."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)


@contextmanager
def closed_when_stopped(close: Callable[[], object]) -> Iterator[None]:
    """While the context lasts, a signal calls `close` and then ends the process.

    Where it is not entered in the main thread, signals keep meaning what they meant.

    Args:
        close: what must still be told to others, e.g. to MLflow; it may take some seconds.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    _books.append(close)
    stop_on_signals()
    try:
        yield
    finally:
        _books.remove(close)
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, _frame: FrameType | None) -> None:
    if _stopping.is_set():  # asked twice
        os._exit(128 + number)
    _stopping.set()
    shown = _SHOW_CURSOR if os.isatty(2) else ""
    os.write(2, f"{shown}\n{MESSAGE}\n".encode())  # no stream: this thread may hold its lock
    closing = threading.Thread(target=_close_books, daemon=True)
    closing.start()
    closing.join(_BOOKS_SECONDS)
    os._exit(128 + number)


def _close_books() -> None:
    for close in reversed(_books):
        close()
