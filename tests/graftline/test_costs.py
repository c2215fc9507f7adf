"""What runs' time went into."""

from __future__ import annotations

import pytest

from graftline.costs import seconds_by_activity


def test_a_step_that_runs_share_counts_once() -> None:
    one = {"align/a": 2.0, "evaluate/x": 3.0, "merge/m": 1.0}
    other = {"align/a": 2.0, "fine-tune/b": 5.0, "perplexity/p": 0.5, "features/f": 4.0}
    found = seconds_by_activity([one, other])
    assert found == pytest.approx(
        {"training": 7.0, "evaluation": 3.5, "merging": 1.0, "preparation": 4.0}
    )
    assert seconds_by_activity([one, one]) == seconds_by_activity([one])
