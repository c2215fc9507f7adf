"""MERA's merge by other coefficients."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from graftline.merging.backbones import CannotMerge, merge_backbones
from graftline.merging.running_average import running_average
from graftline.realignment.weighted_merge import (
    layer_coefficient,
    merge_weighted,
    weighted_average,
)

FLOATS = st.floats(-100, 100, width=32)


@given(st.lists(st.tuples(FLOATS, FLOATS), min_size=1, max_size=20), st.sampled_from([1, 2, 4, 8]))
def test_one_over_i_is_the_running_average(pairs: list[tuple[float, float]], stage: int) -> None:
    old = torch.tensor([a for a, _ in pairs]).to(torch.bfloat16)
    new = torch.tensor([b for _, b in pairs]).to(torch.bfloat16)
    assert torch.equal(weighted_average(old, new, 1 / stage), running_average(old, new, stage))


def test_worked_examples_of_the_coefficients() -> None:
    assert [layer_coefficient(layer, 5, 0.4, 0.5) for layer in range(5)] == pytest.approx(
        [0.2, 0.3, 0.4, 0.5, 0.6]
    )
    assert layer_coefficient(0, 1, 0.4, 0.5) == 0.4  # one layer has no slope
    assert layer_coefficient(4, 5, 0.8, 1.0) == 1.0  # clipped


@given(st.floats(0.01, 0.5), st.floats(-1.0, 1.0), st.integers(2, 40))
def test_the_mean_over_layers_is_the_coefficient(c: float, depth: float, layers: int) -> None:
    found = [layer_coefficient(layer, layers, c, depth) for layer in range(layers)]
    assert sum(found) / layers == pytest.approx(c)
    assert all(0.0 <= each <= 1.0 for each in found)


def test_each_tensor_takes_its_layer_s_share(tiny_folder: Path, tmp_path: Path) -> None:
    vanilla = tmp_path / "vanilla"
    shutil.copytree(tiny_folder, vanilla)
    old = load_file(vanilla / "model.safetensors")
    new = {name: (value.float() + 0.5).to(value.dtype) for name, value in old.items()}
    save_file(new, vanilla / "model.safetensors", metadata={"format": "pt"})
    used = merge_weighted(tiny_folder, vanilla, 0.5, 0.5, tmp_path / "out")
    assert used["model.embed_tokens.weight"] == used["model.layers.0.mlp.up_proj.weight"] == 0.25
    assert used["model.norm.weight"] == used["model.layers.1.mlp.up_proj.weight"] == 0.75
    merged = load_file(tmp_path / "out/model.safetensors")
    for name, value in merged.items():
        assert torch.equal(value, weighted_average(old[name], new[name], used[name])), name
    merge_weighted(tiny_folder, vanilla, 1 / 2, 0.0, tmp_path / "half")
    merge_backbones(tiny_folder, vanilla, 2, tmp_path / "average")
    halves = load_file(tmp_path / "half/model.safetensors")
    average = load_file(tmp_path / "average/model.safetensors")
    assert all(torch.equal(halves[name], average[name]) for name in average)


@pytest.mark.parametrize("fault", ["missing", "shape", "nan"])
def test_what_does_not_belong_together_is_refused(
    fault: str, tiny_folder: Path, tmp_path: Path
) -> None:
    vanilla, name = tmp_path / "vanilla", "model.norm.weight"
    shutil.copytree(tiny_folder, vanilla)
    weights = load_file(vanilla / "model.safetensors")
    if fault == "missing":
        del weights[name]
    elif fault == "shape":
        weights[name] = torch.zeros(3, dtype=weights[name].dtype)
    else:
        weights[name][0] = float("nan")
    save_file(weights, vanilla / "model.safetensors")
    with pytest.raises(CannotMerge, match=name):
        merge_weighted(tiny_folder, vanilla, 0.5, 0.0, tmp_path / "out")
    assert not (tmp_path / "out").exists()
