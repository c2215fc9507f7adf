"""Scoring answers, relative gains, bootstrap intervals, reports and pictures."""

from __future__ import annotations

from graftline.errors import GraftlineError


class EvaluationError(GraftlineError, ValueError):
    """Scores that are missing, out of range or do not belong together."""
