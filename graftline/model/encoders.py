"""The frozen encoders by name: media as numpy arrays in, features as one tensor out."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch

from graftline.data.parts import EFFICIENTNET_LITE0, WHISPER_TINY_EN, fetch
from graftline.errors import GraftlineError
from graftline.model.building import BUILDING
from graftline.model.efficientnet import FrameEncoder, ImageEncoder
from graftline.model.point_sets import BasisPointSetEncoder
from graftline.model.whisper import WhisperAudioEncoder


class Encoder(Protocol):
    """A frozen encoder.

    Attributes:
        name: its name in recipes.
        tokens: tokens a medium becomes.
        width: width of a token.
        sha256: identity of weights and settings; part of every fingerprint that uses features.
    """

    @property
    def name(self) -> str:
        """The name in recipes."""
        ...

    @property
    def tokens(self) -> int:
        """Tokens a medium becomes."""
        ...

    @property
    def width(self) -> int:
        """Width of a token."""
        ...

    @property
    def sha256(self) -> str:
        """Identity of weights and settings."""
        ...

    def encode(self, media: Sequence[np.ndarray]) -> torch.Tensor:
        """Encode decoded media.

        Args:
            media: one array a medium, as the encoder documents.

        Returns:
            (batch, tokens, width) float32 on the CPU, without gradients.

        Raises:
            GraftlineError: a medium has another shape or dtype than the encoder takes.
        """
        ...


def _identity(weights: str, settings: str) -> str:
    """Digest of what the features depend on: the weights' sha256 and the encoder's settings."""
    return hashlib.sha256(f"{weights}\n{settings}".encode()).hexdigest()


IDENTITIES: dict[str, Callable[[], str]] = {
    ImageEncoder.name: lambda: _identity(EFFICIENTNET_LITE0.member_sha256, ImageEncoder.settings),
    FrameEncoder.name: lambda: _identity(EFFICIENTNET_LITE0.member_sha256, FrameEncoder.settings),
    WhisperAudioEncoder.name: lambda: _identity(
        WHISPER_TINY_EN.member_sha256, WhisperAudioEncoder.settings
    ),
    BasisPointSetEncoder.name: lambda: BasisPointSetEncoder(torch.device("cpu")).sha256,
}


def _image(device: torch.device) -> Encoder:
    return ImageEncoder(fetch(EFFICIENTNET_LITE0), IDENTITIES[ImageEncoder.name](), device)


def _frames(device: torch.device) -> Encoder:
    return FrameEncoder(fetch(EFFICIENTNET_LITE0), IDENTITIES[FrameEncoder.name](), device)


def _whisper(device: torch.device) -> Encoder:
    identity = IDENTITIES[WhisperAudioEncoder.name]()
    return WhisperAudioEncoder(fetch(WHISPER_TINY_EN), identity, device)


ENCODERS: dict[str, Callable[[torch.device], Encoder]] = {
    ImageEncoder.name: _image,
    FrameEncoder.name: _frames,
    WhisperAudioEncoder.name: _whisper,
    BasisPointSetEncoder.name: BasisPointSetEncoder,
}


def load_encoder(name: str, device: torch.device | str = "cpu") -> Encoder:
    """Load a frozen encoder.

    Args:
        name: one of ``ENCODERS``.
        device: where it computes; features always come back on the CPU.

    Returns:
        The encoder, in eval mode and without gradients.

    Raises:
        GraftlineError: no such encoder, or its weights cannot be fetched or do not fit.
    """
    _known(name)
    with BUILDING:
        return ENCODERS[name](torch.device(device))


def encoder_identity(name: str) -> dict[str, str]:
    """What a plan records of an encoder, without loading its weights.

    Raises:
        GraftlineError: no such encoder.
    """
    _known(name)
    return {"name": name, "sha256": IDENTITIES[name]()}


def _known(name: str) -> None:
    if name not in ENCODERS:
        near = difflib.get_close_matches(name, ENCODERS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise GraftlineError(f"no encoder {name!r}{hint} There are: {', '.join(sorted(ENCODERS))}")
