"""Routing a loaded model by what a composition left in the store."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from graftline.errors import GraftlineError
from graftline.merging.checkpoints import open_checkpoint
from graftline.model.loading import LoadedModel
from graftline.model.routing.adapters import read_adapters
from graftline.model.routing.layers import routable_parameters, route_backbone
from graftline.model.routing.model import RoutedModel
from graftline.model.routing.router import Text
from graftline.model.routing.weights import DenseWeight, MaskedWeight, Weight


def route_to_experts(
    loaded: LoadedModel, experts: Mapping[str, Path], text: Text = "merged"
) -> LoadedModel:
    """Each modality's tokens meet its expert's weights.

    Args:
        loaded: a model with these modalities' connectors.
        experts: modality -> `transformers` folder of the expert's backbone.
        text: what text meets.

    Raises:
        GraftlineError: the expert lacks a weight, or one does not fit.
    """
    names = routable_parameters(loaded.model.backbone)
    variants = {
        modality: {
            name: DenseWeight(weight) for name, weight in _weights(folder, names, loaded).items()
        }
        for modality, folder in experts.items()
    }
    return _routed(loaded, variants, text)


def route_to_adapters(
    loaded: LoadedModel, adapters: Mapping[str, Path], text: Text = "merged"
) -> LoadedModel:
    """Each modality's tokens meet theta_0 and its own low-rank product.

    Args:
        loaded: a model around theta_0 with the connectors that are asked.
        adapters: modality -> folder of its adapters.
        text: what text meets: theta_0 by `merged`, for nothing else is kept beside the adapters.
    """
    parameters = dict(loaded.model.backbone.named_parameters())
    starts = {
        name: parameters[name].detach() for name in routable_parameters(loaded.model.backbone)
    }
    variants = {
        name: read_adapters(folder, starts)
        for name, folder in adapters.items()
        if name in loaded.model.modality_numbers
    }
    return _routed(loaded, variants, text)


def route_to_masks(
    loaded: LoadedModel,
    modalities: Sequence[str],
    composed: Path,
    base: Path,
    text: Text = "merged",
) -> LoadedModel:
    """Each modality's tokens meet base + scale * mask * tau* (MMER; EMR).

    Args:
        loaded: a model around the composed backbone, with these modalities' connectors.
        modalities: whose tokens.
        composed: folder of a streamed merge by a rule that keeps a mask an expert; its record
            names the experts in the recipe's order, the composition's own.
        base: `transformers` folder of theta_0.
        text: what text meets; the merged weights are base + tau*.

    Raises:
        GraftlineError: a mask or weight is missing, or does not fit.
    """
    names = routable_parameters(loaded.model.backbone)
    places = {modality: _place(composed, modality) for modality in modalities}
    masks = {
        modality: load_file(composed / "masks" / f"expert-{place}.safetensors")
        for modality, place in places.items()
    }
    scales = json.loads((composed / "merge.json").read_text(encoding="utf-8"))["scales"]
    starts = _weights(base, names, loaded)
    parameters = dict(loaded.model.backbone.named_parameters())
    variants: dict[str, dict[str, Weight]] = {modality: {} for modality in modalities}
    for name in names:
        start, shared = starts[name], parameters[name].detach()
        delta = (shared.double() - start.double()).to(start.dtype)
        for modality, place in places.items():
            mask = masks[modality][name].to(start.device)
            scale = float(scales[name][place])
            variants[modality][name] = MaskedWeight(start, delta, mask, scale)
    return _routed(loaded, variants, text)


def _place(composed: Path, modality: str) -> int:
    """Which expert of a composition is the modality's."""
    found = json.loads((composed.parent / "experts.json").read_text(encoding="utf-8"))
    # A composition of whole models says whose expert serves several modalities.
    places = found if isinstance(found, dict) else {name: n for n, name in enumerate(found)}
    if modality not in places:
        known = list(places)
        raise GraftlineError(f"{composed}: holds no expert for {modality} (it has: {known}).")
    return int(places[modality])


def _weights(folder: Path, names: list[str], loaded: LoadedModel) -> dict[str, Tensor]:
    entries = open_checkpoint(folder).entries
    missing = sorted(set(names) - entries.keys())
    if missing:
        raise GraftlineError(f"{folder}: {missing[0]} is missing ({len(missing)} such).")
    like = next(loaded.model.backbone.parameters())
    found: dict[str, Tensor] = {}
    for shard in sorted({entries[name].file for name in names}):
        with safe_open(shard, framework="pt") as file:
            for name in (name for name in names if entries[name].file == shard):
                found[name] = file.get_tensor(name).to(like.device, like.dtype)
    return found


def _routed(
    loaded: LoadedModel, variants: Mapping[str, Mapping[str, Weight]], text: Text
) -> LoadedModel:
    numbers = loaded.model.modality_numbers
    numbered = {numbers[modality]: weights for modality, weights in variants.items()}
    route_backbone(loaded.model.backbone, numbered, text=text)
    return replace(loaded, model=RoutedModel.around(loaded.model).eval())
