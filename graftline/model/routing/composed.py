"""Routing a loaded model by what a composition left in the store."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from graftline.errors import GraftlineError
from graftline.model.loading import LoadedModel
from graftline.model.routing.layers import routable_parameters, route_backbone
from graftline.model.routing.model import RoutedModel
from graftline.model.routing.router import TEXT
from graftline.model.routing.weights import DenseWeight, MaskedWeight, Weight

_WEIGHTS = "model.safetensors"


Text = Literal["merged", "modality"]
"""What text and generated tokens meet: the backbone's own weights, or the modality's."""


def route_to_expert(
    loaded: LoadedModel, modality: str, expert: Path, text: Text = "merged"
) -> LoadedModel:
    """The modality's tokens meet an expert's weights.

    Args:
        loaded: a model with this modality's connector.
        modality: whose tokens.
        expert: `transformers` folder of the expert's backbone.
        text: what text meets.

    Raises:
        GraftlineError: the expert lacks a weight, or one does not fit.
    """
    weights = _weights(expert, routable_parameters(loaded.model.backbone), loaded)
    dense = {name: DenseWeight(weight) for name, weight in weights.items()}
    return _routed(loaded, modality, dense, text)


def route_to_masks(
    loaded: LoadedModel, modality: str, composed: Path, base: Path, text: Text = "merged"
) -> LoadedModel:
    """The modality's tokens meet base + scale * mask * tau* (MMER; EMR).

    Args:
        loaded: a model around the composed backbone, with this modality's connector.
        modality: whose tokens.
        composed: folder of a streamed merge by a rule that keeps a mask an expert; its record
            names the experts in the recipe's order, the composition's own.
        base: `transformers` folder of theta_0.
        text: what text meets; the merged weights are base + tau*.

    Raises:
        GraftlineError: a mask or weight is missing, or does not fit.
    """
    backbone = loaded.model.backbone
    names = routable_parameters(backbone)
    index = _place(composed, modality)
    masks = load_file(composed / "masks" / f"expert-{index}.safetensors")
    scales = json.loads((composed / "merge.json").read_text(encoding="utf-8"))["scales"]
    starts = _weights(base, names, loaded)
    parameters = dict(backbone.named_parameters())
    weights: dict[str, Weight] = {}
    for name in names:
        start, shared = starts[name], parameters[name].detach()
        delta = (shared.double() - start.double()).to(start.dtype)
        mask = masks[name].to(start.device)
        weights[name] = MaskedWeight(start, delta, mask, float(scales[name][index]))
    return _routed(loaded, modality, weights, text)


def _place(composed: Path, modality: str) -> int:
    """Which expert of a composition is the modality's."""
    order = json.loads((composed.parent / "experts.json").read_text(encoding="utf-8"))
    if modality not in order:
        raise GraftlineError(f"{composed}: holds no expert for {modality} (it has: {order}).")
    return int(order.index(modality))


def _weights(folder: Path, names: list[str], loaded: LoadedModel) -> dict[str, Tensor]:
    path = folder / _WEIGHTS
    with safe_open(path, framework="pt") as file:
        missing = sorted(set(names) - set(file.keys()))
        if missing:
            raise GraftlineError(f"{path}: {missing[0]} is missing ({len(missing)} such).")
        like = next(loaded.model.backbone.parameters())
        return {name: file.get_tensor(name).to(like.device, like.dtype) for name in names}


def _routed(
    loaded: LoadedModel, modality: str, weights: Mapping[str, Weight], text: Text
) -> LoadedModel:
    number = loaded.model.modality_numbers[modality]
    text_as = number if text == "modality" else TEXT
    route_backbone(loaded.model.backbone, {number: weights}, text_as=text_as)
    return replace(loaded, model=RoutedModel.around(loaded.model).eval())
