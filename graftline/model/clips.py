"""Encoders that take sounds of one length, given sounds of any."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from graftline.data.wav import fitted
from graftline.model.encoders import Encoder
from graftline.model.whisper import CLIP_SECONDS, WhisperAudioEncoder

CLIPS = {WhisperAudioEncoder.name: CLIP_SECONDS}
"""Encoder -> seconds of sound that it takes, where it takes just so many."""


class ClipEncoder:
    """An encoder of clips before which a sound is cut, or filled with silence.

    Args:
        encoder: takes sounds of `seconds`.
        seconds: what it takes.
    """

    def __init__(self, encoder: Encoder, seconds: int) -> None:
        self._encoder, self._seconds = encoder, seconds
        self.name, self.sha256 = encoder.name, encoder.sha256
        self.tokens, self.width = encoder.tokens, encoder.width

    def encode(self, media: Sequence[np.ndarray]) -> torch.Tensor:
        """Encodes the start of each sound; see `Encoder.encode`."""
        return self._encoder.encode([fitted(samples, self._seconds) for samples in media])


def for_any_length(encoder: Encoder) -> Encoder:
    """The encoder itself, or for one of clips an encoder that takes sounds of any length.

    Clips of the right length go through unchanged.
    """
    seconds = CLIPS.get(encoder.name)
    return encoder if seconds is None else ClipEncoder(encoder, seconds)
