"""What a server could not be told while it was away: kept on disk, told later, in order, once.

Beside the calls stands what their answers were, so that a call may name what an earlier one made
(a run's id) before the server has given it a name. Who dies between telling and noting that,
tells once more: every operation must be one that can be repeated.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

PROMISED = "journal-"
"""How ids begin that the server has not given yet."""
_RETRY_SECONDS = 15.0
_POLL_SECONDS = 5.0

_log = logging.getLogger(__name__)


class Away(Exception):
    """The server does not answer; the same call may succeed later."""


class Refused(Exception):
    """The server answers, and does not accept the call."""


class Journal:
    """Calls to one server.

    Args:
        file: holds the calls that are due; made when there are some.
        perform: carries an operation out and returns the id of what it made, if it made something.
            Raises `Away` or `Refused`.
    """

    def __init__(self, file: Path, perform: Callable[[str, Mapping[str, Any]], str | None]) -> None:
        self._file = file
        self._answers = file.with_suffix(".answers")
        self._perform = perform
        self._threads = threading.RLock()
        self._ids: dict[str, str] = {}
        self._tried = 0.0

    def call(self, operation: str, **arguments: Any) -> str:
        """Carries an operation out, or notes it if the server is away.

        Args:
            operation: its name.
            arguments: plain data.

        Returns:
            The id of what it makes: the server's, or a promised one.

        Raises:
            Refused: the server does not accept it (only if it was not noted).
        """
        if self._file.exists() and time.monotonic() - self._tried > _RETRY_SECONDS:
            self.deliver()
        if not self._file.exists():
            try:
                return self._perform(operation, self._real(arguments)) or ""
            except Away as error:
                _log.warning("MLflow does not answer (%s); kept in %s", error, self._file)
                self._tried = time.monotonic()
        return self._note(operation, arguments)

    def deliver(self) -> bool:
        """Tells what is due, as far as the server answers; says whether nothing is left."""
        self._tried = time.monotonic()
        if not self._file.exists():
            return True
        with self._alone():
            answered = {entry["id"] for entry in _lines(self._answers)}
            due = list(_lines(self._file))
            for entry in due:
                if entry["id"] not in answered:
                    try:
                        made = self._perform(entry["operation"], self._real(entry["arguments"]))
                    except Away:
                        return False
                    except Refused as error:
                        _log.warning("MLflow refuses %s: %s", entry["operation"], error)
                        made = None
                    _append(self._answers, {"id": entry["id"], "made": made})
                    self._ids[entry["id"]] = made or ""
            self._file.unlink(missing_ok=True)
        _log.info("MLflow answers again: %s call(s) delivered", len(due))
        return True

    def deliver_within(self, seconds: float) -> bool:
        """Delivers, asking a server that is away again for so long; says if nothing is left."""
        until = time.monotonic() + seconds
        while not self.deliver():
            left = until - time.monotonic()
            if left <= 0:
                return False
            _log.warning("MLflow does not answer; asking again for %.0f s", left)
            time.sleep(min(_POLL_SECONDS, left))
        return True

    def _note(self, operation: str, arguments: Mapping[str, Any]) -> str:
        promised = PROMISED + uuid.uuid4().hex
        entry = {"id": promised, "operation": operation, "arguments": arguments}
        with self._alone():
            _append(self._file, entry)
        return promised

    def _real(self, value: Any) -> Any:
        """Plain data with promised ids replaced by those that the server gave."""
        if isinstance(value, Mapping):
            return {key: self._real(part) for key, part in value.items()}
        if isinstance(value, list):
            return [self._real(part) for part in value]
        if not isinstance(value, str) or not value.startswith(PROMISED):
            return value
        if value not in self._ids:  # perhaps another process delivered it
            answers = _lines(self._answers)
            self._ids |= {entry["id"]: entry["made"] or "" for entry in answers}
        return self._ids.get(value, value)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._threads, FileLock(self._file.with_suffix(".lock")):
            yield


def _append(path: Path, entry: Mapping[str, Any]) -> None:
    with path.open("a+b") as file:
        if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
            file.write(b"\n")  # the last entry was cut off by a kill, or by a full disk
        file.write(f"{json.dumps(entry)}\n".encode())
        file.flush()
        os.fsync(file.fileno())


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole entries of a file; the last one may be cut off by a kill."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return
    for line in text.splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue
