"""The exact k-th largest of values that do not fit into memory, without sorting them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_BINS = 1 << 16  # of the upper and of the lower half of a float32's bits
_Integers = npt.NDArray[np.int32]


def order_statistics(
    values: Callable[[], Iterable[Sequence[Tensor]]], ranks: Callable[[int], Sequence[int]]
) -> list[tuple[float, ...]]:
    """Finds values by their rank in two walks: a histogram of the upper 16 bits, then the lower.

    Args:
        values: starts a walk; each step gives one float32 tensor a column, finite, all of one
            size.
        ranks: number of values in a column -> the ranks wanted, 1 the largest; they are moved
            into 1..number.

    Returns:
        For each rank the value in each column; exact, and the same however the values are cut
        into steps. Nothing where a column is empty.
    """
    upper = _upper_counts(values())
    if not upper:
        return []
    total = int(upper[0].sum())
    wanted = [min(max(rank, 1), total) for rank in ranks(total)]
    places = [[_locate(counts, rank) for counts in upper] for rank in wanted]
    lower = [[np.zeros(_BINS, np.int64) for _ in upper] for _ in wanted]
    for step in values():
        for column, tensor in enumerate(step):
            keys = _keys(tensor)
            halves = keys >> 16
            for chosen in {rank_places[column][0] for rank_places in places}:
                inside = keys[halves == chosen - _BINS // 2] & (_BINS - 1)
                counted = np.bincount(inside, minlength=_BINS)
                for rank_places, rank_counts in zip(places, lower, strict=True):
                    if rank_places[column][0] == chosen:
                        rank_counts[column] += counted
    return [
        tuple(
            _value(place[0], _locate(counts, place[1])[0])
            for place, counts in zip(rank_places, rank_counts, strict=True)
        )
        for rank_places, rank_counts in zip(places, lower, strict=True)
    ]


def _upper_counts(steps: Iterable[Sequence[Tensor]]) -> list[npt.NDArray[np.int64]]:
    """Histograms of the upper 16 bits, one a column."""
    upper: list[npt.NDArray[np.int64]] = []
    for step in steps:
        upper = upper or [np.zeros(_BINS, np.int64) for _ in step]
        for counts, tensor in zip(upper, step, strict=True):
            halves = torch.from_numpy(_keys(tensor)) >> 16
            counts += torch.bincount(halves.add_(_BINS // 2), minlength=_BINS).numpy()
    return upper if upper and upper[0].any() else []


def _keys(values: Tensor) -> _Integers:
    """Integers in the order of the float32 values."""
    bits: _Integers = values.contiguous().view(torch.int32).flatten().numpy()
    if bits.size and bits.min() < 0:  # negative floats count backwards
        return np.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return bits


def _locate(counts: npt.NDArray[np.int64], rank: int) -> tuple[int, int]:
    """The bin that holds the rank-th largest, and the rank within that bin."""
    above = np.cumsum(counts[::-1])
    place = int(np.searchsorted(above, rank))
    return _BINS - 1 - place, rank - int(above[place] - counts[_BINS - 1 - place])


def _value(upper: int, lower: int) -> float:
    key = np.array([((upper - _BINS // 2) << 16) | lower], np.int32)
    bits = np.where(key < 0, key ^ 0x7FFFFFFF, key).astype(np.int32)
    return float(bits.view(np.float32)[0])
