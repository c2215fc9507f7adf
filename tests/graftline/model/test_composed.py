"""What a composition leaves on the disk, met by a modality's tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from graftline.errors import GraftlineError
from graftline.merging.masks import load_masks
from graftline.merging.streaming import MergeRequest, merge_checkpoints
from graftline.model.routing import RoutedModel, routed
from graftline.model.routing.composed import route_to_experts, route_to_masks
from graftline.realignment.decoupling import decouple
from tests.graftline.model.two_modalities import NAMES, load_two, routed_layers


@pytest.fixture
def folders(tiny_folder: Path, tmp_path: Path) -> dict[str, Path]:
    """theta_0, an expert for each modality, and what MMER makes of them."""
    base = load_file(tiny_folder / "model.safetensors")
    found = {"base": tiny_folder}
    for seed, name in enumerate(NAMES):
        generator = torch.Generator().manual_seed(seed)
        moved = {
            key: value + 0.05 * torch.randn(value.shape, generator=generator).to(value.dtype)
            for key, value in base.items()
        }
        found[name] = tmp_path / name
        found[name].mkdir()
        for file in tiny_folder.iterdir():
            (found[name] / file.name).write_bytes(file.read_bytes())
        save_file(moved, found[name] / "model.safetensors", metadata={"format": "pt"})
    found["composed"] = tmp_path / "artifact" / "backbone"
    merge_checkpoints(
        MergeRequest(
            "mmer", tiny_folder, tuple(found[name] for name in NAMES), found["composed"],
            parameters={"density": 0.5, "alphas": [0.9, 1.1]},
        )
    )  # fmt: skip
    (tmp_path / "artifact" / "experts.json").write_text(json.dumps(NAMES))
    return found


@pytest.mark.parametrize("modality", NAMES)
def test_a_modality_meets_its_decoupled_weights(folders: dict[str, Path], modality: str) -> None:
    model = route_to_masks(
        load_two(folders["composed"]), [modality], folders["composed"], folders["base"]
    )
    assert isinstance(model.model, RoutedModel)
    index = NAMES.index(modality)
    base = load_file(folders["base"] / "model.safetensors")
    shared = load_file(folders["composed"] / "model.safetensors")
    masks = load_masks(folders["composed"] / "masks" / f"expert-{index}.safetensors")
    number = model.model.modality_numbers[modality]
    layers = routed_layers(model)
    assert layers
    for name, layer in layers.items():
        key = f"{name}.weight"
        alpha = (0.9, 1.1)[index]
        delta = shared[key].double() - base[key].double()
        expected = (base[key].double() + alpha * masks[key] * delta).float()
        torch.testing.assert_close(layer._weights[number].dense(), expected)
        assert not torch.equal(expected, shared[key].float())
        assert torch.equal(layer.layer.weight.detach(), shared[key].float())


def test_a_modality_meets_its_expert(folders: dict[str, Path]) -> None:
    model = route_to_experts(load_two(folders["composed"]), {"audio": folders["audio"]})
    expert = load_file(folders["audio"] / "model.safetensors")
    number = model.model.modality_numbers["audio"]
    for name, layer in routed_layers(model).items():
        assert torch.equal(layer._weights[number].dense(), expert[f"{name}.weight"].float())


def test_text_may_meet_the_modality_too(folders: dict[str, Path]) -> None:
    """Then the routed model is the expert itself, for all tokens of a prompt with its medium."""
    expert = load_two(folders["audio"])
    model = route_to_experts(load_two(folders["composed"]), {"audio": folders["audio"]}, "modality")
    width = expert.model.backbone.config.hidden_size
    tokens = torch.randn(2, 6, width, generator=torch.Generator().manual_seed(9))
    number = model.model.modality_numbers["audio"]
    shown = torch.tensor([[0, 0, number, number, 0, 0]] * 2)
    with torch.no_grad():  # embeddings and output layer are shared, so they stay out of it
        own = expert.model.backbone.get_decoder()(inputs_embeds=tokens).last_hidden_state
        with routed(model.model.backbone, shown):
            found = model.model.backbone.get_decoder()(inputs_embeds=tokens).last_hidden_state
    torch.testing.assert_close(found, own)


def test_a_modality_without_expert_is_named(folders: dict[str, Path]) -> None:
    (folders["composed"].parent / "experts.json").write_text('["image", "video"]')
    with pytest.raises(GraftlineError, match=r"no expert for audio \(it has: \['image', 'video'\]"):
        route_to_masks(
            load_two(folders["composed"]), ["audio"], folders["composed"], folders["base"]
        )


def test_a_modality_s_own_backbone_can_be_taken_out(folders: dict[str, Path]) -> None:
    """So that its connector is realigned beside the very weights that its prompts will meet."""
    for modality in NAMES:
        model = route_to_masks(
            load_two(folders["composed"]), [modality], folders["composed"], folders["base"]
        )
        number = model.model.modality_numbers[modality]
        alone = load_two(folders["composed"]).model.backbone
        decouple(alone, folders["composed"].parent, folders["base"], modality)
        own = dict(alone.named_parameters())
        for name, layer in routed_layers(model).items():
            assert torch.equal(own[f"{name}.weight"], layer._weights[number].dense()), name
    with pytest.raises(GraftlineError, match="holds no mask for video"):
        decouple(alone, folders["composed"].parent, folders["base"], "video")
