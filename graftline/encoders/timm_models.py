"""Frozen picture encoders of timm: ViT, EVA, ConvNeXt, Swin and hundreds more, in the hub's layout.

timm imports torchvision, so it is an extra (`pip install 'graftline[timm]'`) and nothing else here
needs either.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from graftline.encoders.arrays import pooled
from graftline.encoders.towers import FRAMES, attempt, check_axes, evenly
from graftline.errors import GraftlineError
from graftline.settings.models import TimmEncoder

_AT_ONCE = 16
"""Pictures in one forward pass."""


class TimmModel:
    """Pictures, or frames of videos, to what a timm model says before its head.

    Args:
        settings: of the recipe.
        media: image or video.
        folder: `config.json` and `model.safetensors`, as the hub's `timm/...` have them.
        name: what people read.
        sha256: identity of weights and settings.
        device: where to compute.

    Raises:
        GraftlineError: timm is not installed, or the folder holds no model of its.
    """

    MEDIA = ("image", "video")

    def __init__(
        self,
        settings: TimmEncoder,
        media: str,
        folder: Path,
        name: str,
        sha256: str,
        device: torch.device,
    ) -> None:
        self.name, self.sha256 = name, sha256
        self._settings, self._device = settings, device
        self._frames = 0 if media == "image" else settings.frames or FRAMES
        self._model, self._prepare = _load(folder, name)
        self._model.to(device)
        probe = self.encode([np.zeros((2, 64, 64, 3)[not self._frames :], np.uint8)])
        self.tokens, self.width = int(probe.shape[1]), int(probe.shape[2])

    @torch.no_grad()
    def encode(self, media: Sequence[np.ndarray]) -> Tensor:
        """Encodes decoded media.

        Args:
            media: uint8 (height, width, 3), or (frames, height, width, 3) of videos.

        Returns:
            (batch, tokens, width) float32 on the CPU.

        Raises:
            GraftlineError: a medium has other axes.
        """
        check_axes(media, "video" if self._frames else "image", self.name)
        videos = (evenly(video, self._frames) for video in media)
        pictures = [frame for video in videos for frame in video] if self._frames else list(media)
        found = [
            self._features(pictures[start : start + _AT_ONCE])
            for start in range(0, len(pictures), _AT_ONCE)
        ]
        features = torch.cat(found)
        features = features.reshape(len(media), -1, features.shape[-1])
        tokens = self._settings.tokens
        return pooled(features, tokens) if tokens else features

    def _features(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """(pictures, positions, width) float32 on the CPU."""
        pixels = torch.stack([self._prepare(Image.fromarray(each)) for each in pictures])
        hidden, first = self._hidden(pixels.to(self._device))
        if self._settings.pooling == "patches":
            hidden = hidden[:, first:]
        elif self._settings.pooling == "mean":
            hidden = hidden[:, first:].mean(1, keepdim=True)
        return hidden.float().cpu()

    def _hidden(self, pixels: Tensor) -> tuple[Tensor, int]:
        """Hidden states, and how many positions at their front are no places of the picture."""
        layer, first = self._settings.layer, int(getattr(self._model, "num_prefix_tokens", 0))
        if layer is None:
            hidden: Tensor = self._model.forward_features(pixels)
            if hidden.ndim == 4:
                wide_last = str(getattr(self._model, "output_fmt", "NCHW")).endswith("NHWC")
                return hidden.flatten(1, 2) if wide_last else hidden.flatten(2).transpose(1, 2), 0
            return hidden, first
        try:
            [states] = self._model.forward_intermediates(
                pixels, indices=[layer], output_fmt="NLC", intermediates_only=True
            )
        except (AttributeError, AssertionError, IndexError, ValueError) as error:
            raise GraftlineError(
                f"{self.name}: gives no hidden states of layer {layer} ({error}); leave layer out"
            ) from error
        return states, 0


def timm_problem() -> str | None:
    """Why timm's models cannot be used here; None if they can."""
    try:
        importlib.import_module("timm.data")
    except Exception as error:  # beside another build of torch torchvision raises what it likes
        return (
            "source: timm needs timm and the torchvision that belongs to this torch "
            f"({error}); pip install 'graftline[timm]'"
        )
    return None


def _load(folder: Path, called: str) -> tuple[Any, Any]:
    """The model without its head, and what makes pixels of a picture."""
    problem = timm_problem()
    if problem:
        raise GraftlineError(problem)
    timm = importlib.import_module("timm")
    data = importlib.import_module("timm.data")
    model = attempt(
        lambda: timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0),
        f"{called}: cannot be read as a timm model",
    )
    prepare = data.create_transform(**data.resolve_data_config({}, model=model))
    return model.eval().requires_grad_(False), prepare
