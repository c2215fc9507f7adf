from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from graftline.merging.backbones import CannotMerge, changed_tensors, merge_backbones
from graftline.merging.running_average import running_average

FLOATS = st.floats(-100, 100, width=32)


def test_worked_example() -> None:
    """Stage 3: two thirds of the old model and one third of the vanilla one."""
    merged = running_average(torch.tensor([3.0, 0.0]), torch.tensor([0.0, 3.0]), 3)
    assert torch.allclose(merged, torch.tensor([2.0, 1.0]))


@given(st.lists(st.tuples(FLOATS, FLOATS), min_size=1, max_size=20), st.integers(1, 9))
def test_equals_a_float64_reference_rounded_once(pairs: list[tuple[float, float]], stage: int):
    old = torch.tensor([a for a, _ in pairs]).to(torch.bfloat16)
    new = torch.tensor([b for _, b in pairs]).to(torch.bfloat16)
    a, b = old.double(), new.double()
    expected = ((stage - 1) / stage * a + b / stage).to(torch.bfloat16)
    merged = running_average(old, new, stage)
    spacing = torch.finfo(torch.bfloat16).eps * torch.maximum(a.abs(), b.abs())
    # the two float64 orders of summing may differ where the exact value lies between two bf16
    assert ((merged.double() - expected.double()).abs() <= spacing).all()
    assert torch.equal(merged[old == new], old[old == new])


@given(st.lists(FLOATS, min_size=1, max_size=20))
def test_stage_one_is_the_new_model_and_merging_with_itself_changes_nothing(values: list[float]):
    tensor = torch.tensor(values)
    assert torch.equal(running_average(torch.zeros_like(tensor), tensor, 1), tensor)
    assert torch.equal(running_average(tensor, tensor.clone(), 4), tensor)


def test_unrolled_chain_is_the_harmonic_sum() -> None:
    """theta_n = theta_0 + sum_i Delta_i / i when every vanilla starts from theta_{i-1}."""
    generator = torch.Generator().manual_seed(0)
    theta = start = torch.randn(50, generator=generator, dtype=torch.float64)
    total = torch.zeros_like(start)
    for stage in range(1, 5):
        delta = torch.randn(50, generator=generator, dtype=torch.float64)
        theta = running_average(theta, theta + delta, stage)
        total += delta / stage
    assert torch.allclose(theta, start + total)


def test_only_what_was_trained_changes(tiny_folder: Path, tmp_path: Path) -> None:
    vanilla = tmp_path / "vanilla"
    shutil.copytree(tiny_folder, vanilla)
    weights = load_file(vanilla / "model.safetensors")
    trained = "model.layers.0.mlp.up_proj.weight"
    weights[trained] = weights[trained] + 0.5
    save_file(weights, vanilla / "model.safetensors", metadata={"format": "pt"})
    merge_backbones(tiny_folder, vanilla, 2, tmp_path / "out")
    assert changed_tensors(tiny_folder, tmp_path / "out") == [trained]
    assert (tmp_path / "out" / "config.json").read_bytes() == (
        tiny_folder / "config.json"
    ).read_bytes()


@pytest.mark.parametrize("fault", ["missing", "surplus", "shape", "nan"])
def test_what_does_not_belong_together_is_refused_before_writing(
    fault: str, tiny_folder: Path, tmp_path: Path
) -> None:
    vanilla = tmp_path / "vanilla"
    shutil.copytree(tiny_folder, vanilla)
    weights = load_file(vanilla / "model.safetensors")
    name = "model.norm.weight"
    if fault == "missing":
        del weights[name]
    elif fault == "surplus":
        weights["model.extra"] = torch.zeros(1)
        name = "model.extra"
    elif fault == "shape":
        weights[name] = torch.zeros(3, dtype=weights[name].dtype)
    else:
        weights[name][0] = float("nan")
    save_file(weights, vanilla / "model.safetensors")
    with pytest.raises(CannotMerge, match=name):
        merge_backbones(tiny_folder, vanilla, 2, tmp_path / "out")
    assert not (tmp_path / "out").exists()
