"""A routed model and its modalities' own dense models, for the tests of routing."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch

from graftline.model.backbone import load_backbone
from graftline.model.loading import assemble, new_connector
from graftline.model.multimodal import Batch, collate
from graftline.model.prompts import MediaSlot
from graftline.model.routing import (
    DenseWeight,
    LowRankWeight,
    MaskedWeight,
    RoutedModel,
    routable_parameters,
    routed,
)

NAMES = ("audio", "image", "point_cloud", "video")
KINDS = ("dense", "masked", "low-rank")
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
DELTA = 0.05
"""Large against the tiny model's weights, so that a wrong route shows."""


class Setting:
    """A tiny model with four modalities and what their weights are, routed and dense."""

    def __init__(self, folder: Path, kind: str, dtype: torch.dtype = torch.float32) -> None:
        self.folder, self.dtype = folder, dtype
        self.loaded = self.load()
        self.model, self.backbone = self.loaded.model, self.loaded.model.backbone
        self.generator = torch.Generator().manual_seed(7)
        self.base = {
            name: self.backbone.get_parameter(name).detach().clone()
            for name in routable_parameters(self.backbone)
        }
        self.delta = {name: self.noise(value) for name, value in self.base.items()}
        with torch.no_grad():  # what text meets differs from the base and from all modalities
            for name, value in self.delta.items():
                self.backbone.get_parameter(name).add_(value, alpha=0.3)
        self.variants = {
            number: {name: self.weight(kind, number, name) for name in self.base}
            for number in self.model.modality_numbers.values()
        }

    def load(self):
        backbone = load_backbone(self.folder, self.dtype, "eager")
        rows = torch.randn(32, 3, 8, generator=torch.Generator().manual_seed(3))
        shape = {"tokens": 2, "hidden": 16}
        pairs = [
            new_connector(name, backbone[0], rows, shape, seed, "backbone1")
            for seed, name in enumerate(NAMES)
        ]
        loaded = assemble(backbone, pairs, "")
        return dataclasses.replace(loaded, model=RoutedModel.around(loaded.model).eval())

    def noise(self, like: torch.Tensor) -> torch.Tensor:
        drawn = torch.randn(like.shape, generator=self.generator)
        return (DELTA * drawn).to(like.dtype)

    def weight(self, kind: str, number: int, name: str):
        base = self.base[name]
        if kind == "masked":
            mask = torch.rand(base.shape, generator=self.generator) < 0.5
            packed = torch.from_numpy(np.packbits(mask.numpy().reshape(-1)))
            return MaskedWeight(base, self.delta[name], packed, scale=0.5 + number)
        if kind == "low-rank" and base.dim() == 2:
            down = self.noise(base[:3])
            return LowRankWeight(
                self.backbone.get_parameter(name), down, self.noise(base[:, :3].contiguous()), 8.0
            )
        return DenseWeight(base + self.noise(base))

    def alone(self, number: int):
        """The multimodal model whose backbone is that of one modality."""
        loaded = self.load()
        with torch.no_grad():
            for name, weight in self.variants[number].items():
                loaded.model.backbone.get_parameter(name).copy_(dense(weight))
        return loaded

    def batch(self, *prompts: tuple[str, ...]) -> Batch:
        """A batch of prompts of texts and, where a part is a modality's name, made-up media."""
        encoded, media = [], []
        for parts in prompts:
            slots = [MediaSlot(part) if part in NAMES else part for part in parts]
            encoded.append(self.loaded.prompts.encode(slots))
            generator = torch.Generator().manual_seed(len("".join(parts)))
            media.append(
                [torch.randn(3, 8, generator=generator) for part in parts if part in NAMES]
            )
        return collate(encoded, media, self.loaded.prompts.pad_id)


def dense(weight) -> torch.Tensor:
    """What a weight means, by the definition."""
    if isinstance(weight, DenseWeight):
        return weight.weight
    if isinstance(weight, LowRankWeight):
        return weight.base.detach() + weight.scale * weight.up @ weight.down
    bits = np.unpackbits(weight.mask.numpy())[: weight.base.numel()]
    mask = torch.from_numpy(bits).view(weight.base.shape)
    return weight.base + weight.scale * mask * weight.delta


@torch.no_grad()
def logits(model, batch: Batch) -> torch.Tensor:
    positions = (batch.attention_mask.cumsum(-1) - 1).clamp(min=0)
    with routed(model.backbone, batch.modality_ids):
        output = model.backbone(
            inputs_embeds=model.embed(batch),
            attention_mask=batch.attention_mask,
            position_ids=positions,
        )
    return output.logits


def generate(model, batch: Batch) -> torch.Tensor:
    return model.generate(batch, 6, pad_id=0, end_id=-1)


MIXED = (
    ("image", "What?"),
    ("Look:", "audio", "and", "video", "Say it."),
    ("point_cloud", "image", "audio", "Which one of the three is it?"),
    ("video", "a", "image", "b", "audio", "c", "point_cloud", "Tell."),
    ("No media at all.",),
)
