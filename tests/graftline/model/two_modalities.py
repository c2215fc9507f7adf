"""A tiny model with two connectors, for the tests of what compositions leave on the disk."""

from __future__ import annotations

from pathlib import Path

import torch

from graftline.model.backbone import load_backbone
from graftline.model.loading import LoadedModel, assemble, new_connector
from graftline.model.routing import RoutedLinear

NAMES = ("image", "audio")


def load_two(folder: Path) -> LoadedModel:
    backbone = load_backbone(folder, torch.float32, "eager")
    rows = torch.randn(32, 3, 8, generator=torch.Generator().manual_seed(3))
    shape = {"tokens": 2, "hidden": 16}
    pairs = [new_connector(name, backbone[0], rows, shape, 0, "backbone1") for name in NAMES]
    return assemble(backbone, pairs, "")


def routed_layers(loaded: LoadedModel) -> dict[str, RoutedLinear]:
    modules = loaded.model.backbone.named_modules()
    return {name: module for name, module in modules if isinstance(module, RoutedLinear)}
