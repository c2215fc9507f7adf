"""What is recorded of a modality, and what is drawn from it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from graftline.errors import GraftlineError
from graftline.model.connectors import MixerConnector
from graftline.realignment.statistics import (
    LastLayer,
    inner_vectors,
    read_statistics,
    save_statistics,
    statistics_of,
)


def two_groups() -> torch.Tensor:
    """90 rows around -5 and 30 around 5, correlated within a group."""
    noise = torch.randn(120, 3, generator=torch.Generator().manual_seed(0))
    noise[:, 1] = 0.8 * noise[:, 0] + 0.2 * noise[:, 1]
    places = torch.tensor([-5.0] * 90 + [5.0] * 30)[:, None]
    return places + noise


def test_the_last_layer_behind_the_inner_vectors_is_the_connector() -> None:
    connector = MixerConnector(3, 8, 2, 16, 6, 0.5)
    features = torch.randn(7, 3, 8)
    connector.reset(features, 0)
    inner = inner_vectors(connector, features)
    assert inner.shape == (7, connector.project.in_features)
    with torch.no_grad():
        assert torch.equal(LastLayer(connector)(inner), connector(features))


def test_drawn_vectors_have_the_recorded_moments(tmp_path: Path) -> None:
    rows = two_groups()
    asked = ["What?"] * 80 + ["Tell me."] * 40
    recorded = statistics_of(rows, asked, 2, seed=0)
    assert sorted(recorded.counts.tolist()) == [30, 90]
    save_statistics(tmp_path, recorded)
    drawn, questions = read_statistics(tmp_path).sample(20_000, seed=1)
    assert torch.allclose(drawn.mean(0), rows.mean(0), atol=0.15)
    assert torch.allclose(drawn.T.cov(), rows.T.cov(correction=0), atol=0.4)
    low = drawn[drawn[:, 0] < 0]
    assert torch.allclose(low.T.cov(), rows[:90].T.cov(), atol=0.2)
    assert questions.count("What?") / len(questions) == pytest.approx(2 / 3, abs=0.02)
    again, same = recorded.sample(20_000, seed=1)
    assert torch.equal(again, drawn)
    assert same == questions
    assert not torch.equal(recorded.sample(20_000, seed=2)[0], drawn)


def test_fewer_rows_than_clusters_are_their_own_centres_and_nothing_is_refused() -> None:
    rows = two_groups()[::40]
    recorded = statistics_of(rows, ["What?"] * 3, 64, seed=0)
    assert torch.allclose(recorded.centres.sort(0).values, rows.sort(0).values)
    assert float(recorded.covariance.abs().max()) < 1e-9
    with pytest.raises(GraftlineError, match="nothing to record"):
        statistics_of(rows[:0], [], 4, seed=0)
    with pytest.raises(GraftlineError, match="not finite"):
        statistics_of(rows * float("nan"), ["What?"] * 3, 4, seed=0)
