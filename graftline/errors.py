"""The one base of the errors that Graftline raises on purpose."""

from __future__ import annotations


class GraftlineError(Exception):
    """An error whose message a user can act on."""
