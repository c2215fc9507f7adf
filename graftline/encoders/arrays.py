"""Rows that hold float arrays: a sensor's values, or features that another model made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from graftline.data.features import _check_finite, finish
from graftline.data.kinds import decode_features
from graftline.data.shares import FEATURES_FILE, SHARES, encode_share
from graftline.errors import GraftlineError
from graftline.model.encoders import Encoder
from graftline.settings.models import FeatureRows


class ArrayEncoder:
    """Takes arrays as they are; all must have the tokens and the width of the first one.

    Args:
        settings: of the recipe. With `tokens`, rows of any length are averaged down to so many.
        sha256: identity of the settings.
    """

    name = "features"

    def __init__(self, settings: FeatureRows, sha256: str) -> None:
        self.sha256 = sha256
        self._pooled = settings.tokens
        self._tokens, self._width = settings.tokens, settings.width

    @property
    def tokens(self) -> int:
        """Tokens of a row; 0 before the first row was seen, if the recipe does not say."""
        return self._tokens or 0

    @property
    def width(self) -> int:
        """Width of a token; 0 before the first row was seen, if the recipe does not say."""
        return self._width or 0

    def expect(self, tokens: int, width: int) -> None:
        """Says what every row must become, before one was seen: what a connector was made for."""
        self._tokens, self._width = tokens, width

    def encode(self, media: Sequence[np.ndarray]) -> torch.Tensor:
        """Checks arrays and stacks them.

        Args:
            media: float16 or float32 (tokens, width) each.

        Returns:
            (batch, tokens, width) float32 on the CPU.

        Raises:
            GraftlineError: an array has another width or number of tokens; gives both figures.
        """
        found = []
        for values in media:
            self._width = self._width or values.shape[1]
            if values.shape[1] != self._width:
                raise GraftlineError(
                    f"features of width {values.shape[1]}; expected {self._width}, as the recipe "
                    "says or the first row that it learned from has"
                )
            row = torch.from_numpy(np.array(values, np.float32))
            found.append(pooled(row[None], self._pooled)[0] if self._pooled else row)
            self._tokens = self._tokens or len(values)
            if len(found[-1]) != self._tokens:
                raise GraftlineError(
                    f"{len(values)} tokens; expected {self._tokens}, as the first row has. Set "
                    "tokens of the encoder, and every row is averaged down to so many"
                )
        return torch.stack(found)


def pooled(features: torch.Tensor, tokens: int) -> torch.Tensor:
    """Averages neighbouring positions: (batch, positions, width) to (batch, tokens, width)."""
    averaged: torch.Tensor = torch.nn.functional.adaptive_avg_pool1d(
        features.transpose(1, 2), tokens
    )
    return averaged.transpose(1, 2)


def compute_array_features(
    rows: Any,
    modality: str,
    encoder: Encoder,
    out_folder: Path,
    *,
    shares: Path | None = None,
    batch: int = 64,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Encodes rows that hold arrays; else as `graftline.data.features.compute_features`.

    That one decodes pictures, sounds and points, and its code is part of every features'
    fingerprint; so this stands beside it.

    Args:
        rows: what slices to the columns `id` and `media` (npy bytes), as `SplitRows` does.
        modality: not used; arrays are arrays.
        encoder: the frozen encoder.
        out_folder: where to write; made if absent.
        shares: folder of what is done; whoever is stopped goes on from it.
        batch: rows encoded together.
        progress: called after each batch with the number of its rows.

    Raises:
        GraftlineError: names file and row.
    """

    def encode(names: Sequence[str], stored: Sequence[Any]) -> torch.Tensor:
        media = zip(names, stored, strict=True)
        arrays = [_named(name, decode_features, medium) for name, medium in media]
        features = _encoded(encoder, arrays, names).to(torch.float16)
        _check_finite(features, names, out_folder / FEATURES_FILE)
        return features

    folder = shares or out_folder / SHARES
    seen = encoder.expect if isinstance(encoder, ArrayEncoder) else None
    encode_share(rows, encode, folder, batch=batch, progress=progress, seen=seen)
    finish(folder, out_folder, encoder)


def _encoded(encoder: Encoder, arrays: Sequence[np.ndarray], names: Sequence[str]) -> torch.Tensor:
    """Features of a batch; an array that is refused names its row."""
    try:
        return encoder.encode(arrays)
    except GraftlineError:
        for name, values in zip(names, arrays, strict=True):
            _named(name, encoder.encode, [values])
        raise


def _named(name: str, attempt: Callable[[Any], Any], value: Any) -> Any:
    try:
        return attempt(value)
    except GraftlineError as error:
        raise GraftlineError(f"row {name}: {error}") from error
