"""Features of a split: computed once by a frozen encoder, stored memory-mapped.

A folder of features holds ``features.safetensors`` (one tensor ``features``, float16, rows x
tokens x width) and ``rows.json`` (the encoder's name and digest, and the row ids in order).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from graftline.data.rows import decode
from graftline.data.shares import (
    FEATURES_FILE,
    ROWS_FILE,
    SHARES,
    TENSOR,
    Progress,
    encode_share,
    join_shares,
)
from graftline.errors import GraftlineError
from graftline.model.encoders import Encoder
from graftline.team import current


def _check_finite(features: torch.Tensor, ids: Sequence[str], path: Path) -> None:
    finite = features.isfinite().flatten(1).all(dim=1)
    if not bool(finite.all()):
        row = ids[int((~finite).nonzero()[0, 0])]
        raise GraftlineError(
            f"{path}: the features of row {row} hold NaN or values beyond float16; check the "
            "medium of this row and the weights of the encoder"
        )


def _decode(medium: bytes, modality: str, name: str) -> NDArray[Any]:
    try:
        return decode(medium, modality)
    except GraftlineError as error:
        raise GraftlineError(f"row {name}: {error}") from error


def compute_features(
    rows: Any,
    modality: str,
    encoder: Encoder,
    out_folder: Path,
    *,
    shares: Path | None = None,
    batch: int = 64,
    progress: Progress | None = None,
) -> None:
    """Encode every row of a split and write the features.

    Only one batch is held in memory at a time.

    Args:
        rows: what slices to the columns ``id`` and ``media``, as ``SplitRows`` does.
        modality: how the media are encoded.
        encoder: the frozen encoder.
        out_folder: where to write; made if absent.
        shares: folder of what is done; whoever is stopped goes on from it.
        batch: rows encoded together.
        progress: called after each batch with the number of its rows.

    Raises:
        GraftlineError: a medium cannot be decoded or encoded, or its features are not finite; the
            message names file and row.
    """

    def encode(names: Sequence[str], stored: Sequence[Any]) -> torch.Tensor:
        media = [_decode(each, modality, name) for each, name in zip(stored, names, strict=True)]
        try:
            features = encoder.encode(media).to(torch.float16)
        except GraftlineError as error:
            raise GraftlineError(f"rows {names[0]} to {names[-1]}: {error}") from error
        expected = (len(names), encoder.tokens, encoder.width)
        if tuple(features.shape) != expected:
            raise GraftlineError(
                f"{encoder.name} gave features {tuple(features.shape)} for {expected}"
            )
        _check_finite(features, names, out_folder / FEATURES_FILE)
        return features

    folder = shares or out_folder / SHARES
    encode_share(rows, encode, folder, batch=batch, progress=progress)
    finish(folder, out_folder, encoder)


def finish(shares: Path, out_folder: Path, encoder: Encoder) -> None:
    """Waits for the team's shares; its first process makes the split's features of them."""
    current().wait()
    if current().first:
        described = {"encoder": encoder.name, "sha256": encoder.sha256}
        join_shares(shares, out_folder, described)


class FeatureTable:
    """Memory-mapped features of a split; nothing is read before it is asked for.

    Args:
        folder: what ``compute_features`` wrote.

    Attributes:
        ids: ids of the rows, in order.
        encoder: name of the encoder.
        sha256: the encoder's digest.
        shape: rows, tokens, width.

    Raises:
        GraftlineError: a file is missing or damaged, or the two files disagree.
    """

    def __init__(self, folder: Path | str) -> None:
        self.path = Path(folder) / FEATURES_FILE
        index = Path(folder) / ROWS_FILE
        try:
            description = json.loads(index.read_text(encoding="utf-8"))
            self.ids: list[str] = description["ids"]
            self.encoder: str = description["encoder"]
            self.sha256: str = description["sha256"]
            with safe_open(self.path, framework="pt") as file:
                self._features: torch.Tensor = file.get_tensor(TENSOR)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise GraftlineError(
                f"{folder}: not a readable folder of features ({error}); delete it so that the "
                "features are computed again"
            ) from error
        rows, tokens, width = self._features.shape
        self.shape = (int(rows), int(tokens), int(width))
        if rows != len(self.ids):
            raise GraftlineError(
                f"{self.path} holds {rows} rows, {index} names {len(self.ids)}; delete the folder"
            )

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, indices: int | slice | Sequence[int] | torch.Tensor) -> torch.Tensor:
        """Read rows as float32.

        Args:
            indices: one row, a slice, or a sequence of rows.

        Returns:
            (tokens, width) for one row, else (rows, tokens, width); float32, a copy.

        Raises:
            GraftlineError: a row's features are not finite; names the file and the row.
        """
        return self.read(indices)

    def read(
        self,
        indices: int | slice | Sequence[int] | torch.Tensor,
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        """Read rows in the dtype asked for; else as ``table[indices]``."""
        if isinstance(indices, int):
            return self.read([indices], dtype)[0]
        if isinstance(indices, slice):
            wanted = torch.arange(len(self))[indices]
        else:
            wanted = torch.as_tensor(indices, dtype=torch.long)
        part = self._features[wanted]
        if not bool(part.isfinite().all()):
            _check_finite(part, [self.ids[int(index)] for index in wanted], self.path)
        return part.to(dtype)
