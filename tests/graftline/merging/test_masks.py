from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from graftline.merging.core import Merged, decoupled
from graftline.merging.masks import (
    DamagedMasks,
    bits_per_parameter,
    decoupled_weight,
    load_masks,
    pack,
    save_masks,
    unpack,
)


@given(st.lists(st.booleans(), max_size=40))
def test_packing_takes_one_bit_and_comes_back(bits):
    mask = torch.tensor(bits, dtype=torch.bool)
    packed = pack(mask)
    assert packed.dtype == torch.uint8 and packed.numel() == -(-len(bits) // 8)
    assert torch.equal(unpack(packed, tuple(mask.shape)), mask)


def test_files_keep_names_and_shapes(tmp_path: Path):
    masks = {"a": torch.rand(3, 5) > 0.5, "b": torch.rand(17) > 0.5, "c": torch.rand(()) > 0.5}
    save_masks(masks, tmp_path / "m.safetensors")
    loaded = load_masks(tmp_path / "m.safetensors")
    assert loaded.keys() == masks.keys()
    assert all(torch.equal(loaded[name], mask) for name, mask in masks.items())


def test_damaged_masks_are_named(tmp_path: Path):
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.zeros(3, dtype=torch.uint8)}, path, metadata={"shapes": '{"a": [99]}'})
    with pytest.raises(DamagedMasks, match=r"m\.safetensors[\s\S]*a: "):
        load_masks(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(DamagedMasks, match=r"m\.safetensors"):
        load_masks(path)


def test_four_experts_take_36_bits():
    assert bits_per_parameter(4) == 36


@pytest.mark.parametrize("scale", [1.0, 0.5, 1.7])
def test_the_stored_shared_model_gives_each_expert_back(scale: float):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(1000, generator=generator)
    tau = torch.randn(1000, generator=generator).mul_(0.01)
    mask = torch.rand(1000, generator=generator) > 0.5
    own = decoupled_weight(base, base + tau, mask, scale)
    exact = decoupled(base, Merged(tau, (mask,), (scale,)), 0)
    assert torch.equal(own[~mask], base[~mask])
    assert torch.allclose(own, exact, rtol=1e-6, atol=1e-6)
    if scale == 1.0:
        assert torch.equal(own[mask], (base + tau)[mask])
