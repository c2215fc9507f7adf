"""What is waited for, and how long, when Prefect's server is away."""

from __future__ import annotations

import httpx

AWAY_SECONDS = 900.0
"""How long a step or a run waits for a server that does not answer."""


def is_away(error: BaseException) -> bool:
    """Whether a request failed because the server, or its database, did not do its work."""
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code >= 500
    return isinstance(error, httpx.TransportError)
