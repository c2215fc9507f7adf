"""Stopping soon: a signal reaches the threads that compute, not only the main thread.

Python hands signals to the main thread, which waits for worker threads that may train for
minutes. So the handler also raises `KeyboardInterrupt` in every thread that is inside
`interruptible`, which stops it at its next bytecode (about one optimiser step).
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_PATIENCE_SECONDS = 20.0
_threads: set[int] = set()
_stopping = threading.Event()
_requested: list[int] = []


def remember_signals() -> None:
    """Makes SIGINT and SIGTERM raise `KeyboardInterrupt`, and remembers that they came.

    Some libraries swallow what is raised while they are imported: see `raise_if_requested`.
    """

    def handle(number: int, _frame: FrameType | None) -> None:
        _requested.append(number)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)


def requested() -> int | None:
    """The signal that asked this process to stop, if one did."""
    return _requested[0] if _requested else None


def raise_if_requested() -> None:
    """Raises `KeyboardInterrupt` if a signal came and what it raised got lost."""
    if _requested:
        raise KeyboardInterrupt


@contextmanager
def interruptible() -> Iterator[None]:
    """Marks this thread as one that computes and may be interrupted."""
    if _stopping.is_set():
        raise KeyboardInterrupt
    ident = threading.get_ident()
    _threads.add(ident)
    try:
        yield
    finally:
        _threads.discard(ident)


def interrupt_threads() -> None:
    """Raises `KeyboardInterrupt` in every other thread that is inside `interruptible`."""
    _stopping.set()
    for ident in _threads - {threading.get_ident()}:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(ident), ctypes.py_object(KeyboardInterrupt)
        )


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGINT and SIGTERM also stop the computing threads; what they did before, they still do."""
    _stopping.clear()
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: FrameType | None) -> None:
        if _stopping.is_set():  # asked twice
            os._exit(128 + number)
        _requested.append(number)
        interrupt_threads()
        threading.Thread(target=_force, args=(number,), daemon=True).start()
        previous = before[signal.Signals(number)]
        if callable(previous):
            previous(number, frame)
        raise KeyboardInterrupt

    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        if not _stopping.is_set():
            for number, previous in before.items():
                signal.signal(number, previous if previous is not None else signal.SIG_DFL)


def _force(number: int) -> None:
    time.sleep(_PATIENCE_SECONDS)
    os._exit(128 + number)
