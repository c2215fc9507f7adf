"""Experts as low-rank products beside theta_0."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from graftline.asking.parts import Parts, load_parts
from graftline.model import opening, precision
from graftline.model.backbone import load_backbone
from graftline.model.loading import save_connector
from graftline.model.multimodal import collate
from graftline.model.opening import open_backbone
from graftline.model.prompts import MediaSlot
from graftline.model.routing import LowRankWeight, routable_parameters
from graftline.model.routing.adapters import low_rank, read_adapters, write_adapters
from graftline.model.routing.composed import route_to_adapters, route_to_experts
from tests.graftline.model.two_modalities import NAMES, load_two, routed_layers

RANK = 3


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)])
@pytest.mark.parametrize("rank", [1, 4, 50])
def test_the_nearest_product_of_its_rank(shape: tuple[int, int], rank: int) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    up, down = low_rank(matrix, rank)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    best = (left[:, :rank] * values[:rank]) @ right[:rank]
    assert up.shape[1] == down.shape[0] == min(rank, *shape)
    torch.testing.assert_close(up @ down, best)


@pytest.fixture
def experts(tiny_folder: Path, tmp_path: Path) -> dict[str, Path]:
    """Two experts as LoRA leaves them: theta_0, a product of rank 3 in each layer, other norms."""
    base = load_file(tiny_folder / "model.safetensors")
    inner = set(routable_parameters(load_backbone(tiny_folder, torch.float32, "eager")[0]))
    found = {}
    for seed, modality in enumerate(NAMES):
        generator = torch.Generator().manual_seed(seed)

        def tuned(name: str, value: torch.Tensor, generator=generator) -> torch.Tensor:
            if name not in inner:
                return value
            if value.dim() == 1:
                return value + 0.1
            up = torch.randn(value.shape[0], RANK, generator=generator)
            down = torch.randn(RANK, value.shape[1], generator=generator)
            return (value.float() + 0.02 * up @ down).to(value.dtype)

        found[modality] = tmp_path / modality
        found[modality].mkdir()
        for file in tiny_folder.iterdir():
            (found[modality] / file.name).write_bytes(file.read_bytes())
        moved = {name: tuned(name, value) for name, value in base.items()}
        save_file(moved, found[modality] / "model.safetensors", metadata={"format": "pt"})
    return found


@pytest.fixture
def adapters(tiny_folder: Path, experts: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    base = load_backbone(tiny_folder, torch.float32, "eager")[0]
    found = {name: tmp_path / f"adapters-{name}" for name in NAMES}
    for name, folder in found.items():
        write_adapters(base, experts[name], RANK, folder)
    return found


def test_a_lora_expert_is_kept_whole(tiny_folder, experts, adapters) -> None:
    base = load_backbone(tiny_folder, torch.float32, "eager")[0]
    starts = {name: base.get_parameter(name).detach() for name in routable_parameters(base)}
    whole = load_file(experts["audio"] / "model.safetensors")
    weights = read_adapters(adapters["audio"], starts)
    assert any(isinstance(weight, LowRankWeight) for weight in weights.values())
    for name, weight in weights.items():
        # the expert was rounded to bfloat16 when its product was folded in
        torch.testing.assert_close(weight.dense(), whole[name].float(), rtol=0.01, atol=2e-3)


def test_a_prompt_of_one_modality_meets_its_expert(tiny_folder, experts, adapters) -> None:
    kept = route_to_adapters(load_two(tiny_folder), adapters, "modality")
    assert set(kept.records) == set(NAMES)
    whole = route_to_experts(load_two(tiny_folder), experts)
    numbers = whole.model.modality_numbers
    found, wanted = routed_layers(kept), routed_layers(whole)
    assert found.keys() == wanted.keys()
    for name in NAMES:
        for key, layer in wanted.items():
            expected = layer._weights[numbers[name]].dense()
            torch.testing.assert_close(
                found[key]._weights[numbers[name]].dense(), expected, rtol=0.01, atol=2e-3
            )


def test_text_meets_the_llm_that_nothing_has_changed(tiny_folder, experts, adapters) -> None:
    kept = route_to_adapters(load_two(tiny_folder), adapters, "modality")
    base = load_file(tiny_folder / "model.safetensors")
    for key, layer in routed_layers(kept).items():
        torch.testing.assert_close(layer.layer.weight.detach(), base[f"{key}.weight"].float())


@pytest.mark.parametrize("fast", [True, False], ids=["made-in-bfloat16", "made-in-float32"])
def test_adapters_are_asked_where_another_dtype_is_fast(
    fast: bool, tiny_folder, experts, adapters, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(precision, "_cpu_multiplies_bfloat16", lambda: fast)
    monkeypatch.setattr(opening, "products_are_faster_wide", lambda *_: False)
    made, _ = open_backbone(tiny_folder, "bfloat16", "eager", "cpu")
    made_in = torch.bfloat16 if fast else torch.float32
    for name, expert in experts.items():
        write_adapters(made, expert, RANK, adapters[name])
        stored = load_file(adapters[name] / "adapters.safetensors")
        assert {value.dtype for value in stored.values()} == {made_in}
    two = load_two(tiny_folder)
    for name in NAMES:
        save_connector(tmp_path, two.records[name], two.model.connectors[name])
    connectors = dict.fromkeys(NAMES, tmp_path)
    parts = Parts("it", tiny_folder, connectors, {}, "bfloat16", "eager", "", 4, adapters=adapters)
    monkeypatch.setattr(precision, "_cpu_multiplies_bfloat16", lambda: not fast)
    loaded = load_parts(parts, "cpu")
    number = loaded.model.modality_numbers["audio"]
    whole = load_file(experts["audio"] / "model.safetensors")
    for key, layer in routed_layers(loaded).items():
        found = layer._weights[number].dense()
        assert found.dtype == loaded.model.backbone.dtype != made_in
        torch.testing.assert_close(
            found.float(), whole[f"{key}.weight"].float(), rtol=0.02, atol=4e-3
        )
    prompt = loaded.prompts.encode([MediaSlot("audio"), "What?"], "red")
    with torch.inference_mode():
        loss = loaded.model(collate([prompt], [[torch.randn(3, 8)]], loaded.prompts.pad_id))
    assert loss.isfinite()
