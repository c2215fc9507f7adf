"""What is waited for, and how long, when Prefect's server is away."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

import httpx

_AWAY_SECONDS = 900.0
_POLL_SECONDS = 2.0
_Answer = TypeVar("_Answer")

_log = logging.getLogger(__name__)


def patiently(ask: Callable[[], _Answer], what: str, seconds: float = _AWAY_SECONDS) -> _Answer:
    """Asks Prefect's server; where it is away, again and again.

    Args:
        ask: what is asked; it may be asked more than once.
        what: for the log.
        seconds: how long; a quarter of an hour if left out.

    Raises:
        Exception: what `ask` raises where the server answers, or at last.
    """
    given_up = time.monotonic() + seconds
    while True:
        try:
            return ask()
        except Exception as error:
            if not is_away(error) or time.monotonic() > given_up:
                raise
            _log.warning("%s: Prefect's server does not answer (%s)", what, error)
            time.sleep(_POLL_SECONDS)


def is_away(error: BaseException) -> bool:
    """Whether a request failed because the server, or its database, did not do its work."""
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code >= 500
    if isinstance(error, httpx.TransportError):
        return True
    return error.__cause__ is not None and is_away(error.__cause__)
