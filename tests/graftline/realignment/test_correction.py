"""The closed-form correction: exact where the backbones differ by a map of the token space."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from graftline.errors import GraftlineError
from graftline.model.connectors import MixerConnector
from graftline.realignment.correction import correcting_map, first_readings, fold_into

WIDTH = 6


def readings(seed: int, rows: int = 15) -> torch.Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed)).double()


def a_map(seed: int) -> torch.Tensor:
    """Invertible, not far from the identity."""
    generator = torch.Generator().manual_seed(seed)
    return torch.eye(WIDTH).double() + 0.2 * torch.randn(WIDTH, WIDTH, generator=generator).double()


@given(st.integers(0, 1000))
def test_a_map_of_the_token_space_is_found_exactly(seed: int) -> None:
    """R_new = R_old M^-1: the layers read of M t what they read of t."""
    old, moved = readings(seed), a_map(seed + 1)
    found = correcting_map(old, old @ torch.linalg.inv(moved), ridge=0.0)
    assert torch.allclose(found, moved, atol=1e-8)


@given(st.integers(0, 1000), st.floats(1e-3, 10.0))
def test_equal_backbones_are_left_alone_and_the_minimum_is_one(seed: int, ridge: float) -> None:
    old, new = readings(seed), readings(seed + 7)
    assert torch.allclose(correcting_map(old, old, ridge), torch.eye(WIDTH).double())
    found = correcting_map(old, new, ridge)
    weight = ridge * (new.T @ new).diagonal().mean()

    def objective(matrix: torch.Tensor) -> torch.Tensor:
        away = matrix - torch.eye(WIDTH).double()
        return (new @ matrix - old).square().sum() + weight * away.square().sum()

    for step in range(5):
        other = found + 0.01 * readings(step, WIDTH)
        assert objective(found) < objective(other)


def test_a_connector_says_the_mapped_tokens() -> None:
    torch.manual_seed(0)
    connector = MixerConnector(3, 8, 2, 16, WIDTH, 0.5)
    features = torch.randn(40, 3, 8)
    connector.reset(features, 0)
    with torch.no_grad():
        connector.gain.mul_(1 + 0.3 * torch.rand(WIDTH))
        before, moved = connector(features).double(), a_map(3)
        fold_into(connector, moved, seed=0)
        after, wanted = connector(features).double(), before @ moved.T
    likeness = torch.nn.functional.cosine_similarity(after, wanted, dim=-1)
    assert float(likeness.min()) > 1 - 1e-6
    lengths = after.norm(dim=-1).mean() / wanted.norm(dim=-1).mean()
    assert float(lengths) == pytest.approx(1.0, abs=0.05)


def test_readings_fold_the_norms_in_and_name_what_is_missing(
    tiny, tiny_folder: Path, tmp_path: Path
) -> None:
    layer = tiny[0].model.layers[0]
    token = torch.randn(5, 64)
    read = first_readings(tiny_folder, 1)
    queries = layer.self_attn.q_proj(layer.input_layernorm.weight * token)
    assert torch.allclose((read[:64] @ token.double().T).T, queries.double(), atol=1e-5)
    assert len(first_readings(tiny_folder, 9)) == 2 * len(read)
    shutil.copytree(tiny_folder, tmp_path / "other")
    weights = load_file(tmp_path / "other/model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "other/model.safetensors")
    with pytest.raises(GraftlineError, match=r"layers.0.mlp.up_proj.weight is missing"):
        first_readings(tmp_path / "other", 1)
