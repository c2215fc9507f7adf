"""How far an expert lies from its base: weights that were trained from others stay near them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch

from graftline.errors import GraftlineError
from graftline.merging.checkpoints import DTYPES
from graftline.weight_files import FLOAT_BYTES, Entry

FARTHEST = 1.0
"""Distance from which on a base is no base: unrelated weights of one size are sqrt(2) apart, and
fine-tuning moves a model by a few hundredths."""
_SAMPLED = 12
_ROWS = 256


def distance(base: Mapping[str, Entry], expert: Mapping[str, Entry]) -> float | None:
    """The norm of what an expert has learned as a share of its base's norm.

    Up to `_ROWS` rows of up to `_SAMPLED` matrices over the whole depth are compared.

    Args:
        base: tensors of the base.
        expert: tensors of the expert.

    Returns:
        `||expert - base|| / ||base||`; None where they share no matrix of one shape, or the base's
        are zero.
    """
    shared = [
        name
        for name, entry in base.items()
        if len(entry.shape) == 2
        and entry.floating
        and name in expert
        and expert[name].shape == entry.shape
        and expert[name].floating
    ]
    step = max(1, len(shared) // _SAMPLED)
    apart, size = 0.0, 0.0
    for name in shared[::step]:
        ours, theirs = _rows(base[name]), _rows(expert[name])
        apart += float((theirs - ours).square().sum())
        size += float(ours.square().sum())
    return math.sqrt(apart / size) if size else None


def require_kin(
    base: Mapping[str, Entry], expert: Mapping[str, Entry], folders: tuple[Path, Path]
) -> None:
    """Refuses an expert that was not trained from a base.

    Args:
        base: tensors of the base.
        expert: tensors of the expert.
        folders: theirs, for the message.

    Raises:
        GraftlineError: says how far apart they are.
    """
    found = distance(base, expert)
    if found is not None and not found <= FARTHEST:  # NaN is no kin either
        raise GraftlineError(
            f"{folders[1]}: its weights lie {found:.2f} times the base's norm away from "
            f"{folders[0]} (fine-tuned ones: a few hundredths; unrelated ones: 1.41), so it was "
            "not trained from this base. Give the base that it was trained from."
        )


def _rows(entry: Entry) -> torch.Tensor:
    rows = min(_ROWS, entry.shape[0])
    count = rows * entry.shape[1] * FLOAT_BYTES[entry.dtype]
    values = torch.frombuffer(bytearray(entry.read(0, count)), dtype=DTYPES[entry.dtype])
    return values.reshape(rows, entry.shape[1]).double()
