"""A modality's own backbone, taken out of a composition by its mask (MMER, arXiv 2505.17110)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from graftline.errors import GraftlineError
from graftline.merging.backbones import WEIGHTS
from graftline.model.routing.layers import routable_parameters
from graftline.model.routing.weights import MaskedWeight


@torch.no_grad()
def decouple(backbone: Any, composition: Path, base: Path, modality: str) -> None:
    """Gives a composed backbone the weights that a modality's prompts meet, in place.

    Args:
        backbone: the composition's backbone, loaded.
        composition: artifact of a composition that keeps a mask an expert.
        base: `transformers` folder of theta_0.
        modality: whose weights.

    Raises:
        GraftlineError: the composition holds no mask of the modality.
    """
    order = json.loads((composition / "experts.json").read_text(encoding="utf-8"))
    if modality not in order:
        raise GraftlineError(f"{composition}: holds no mask for {modality} (it has: {order}).")
    place = order.index(modality)
    folder = composition / "backbone"
    masks = load_file(folder / "masks" / f"expert-{place}.safetensors")
    scales = json.loads((folder / "merge.json").read_text(encoding="utf-8"))["scales"]
    parameters = dict(backbone.named_parameters())
    with safe_open(base / WEIGHTS, framework="pt") as file:
        for name in routable_parameters(backbone):
            shared = parameters[name]
            start = file.get_tensor(name).to(shared.device, shared.dtype)
            delta = (shared.double() - start.double()).to(start.dtype)
            mask = masks[name].to(shared.device)
            shared.copy_(MaskedWeight(start, delta, mask, float(scales[name][place])).dense())
