"""The exact k-th largest of values that do not fit into memory, without sorting them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from graftline.merging.core import Block, Walk

_BINS = 1 << 16  # of the upper and of the lower half of a float32's bits

Columns = Callable[[Block], Sequence[Tensor]]
_Counts = npt.NDArray[np.int64]
_Halves = npt.NDArray[np.uint16]
_Integers = npt.NDArray[np.int32]


def order_statistics(
    walk: Walk, columns: Columns, ranks: Callable[[int], Sequence[int]]
) -> list[tuple[float, ...]]:
    """Finds values by their rank in two walks: a histogram of the upper 16 bits, then the lower.

    Args:
        walk: over the blocks.
        columns: what to look at in a block: one float32 tensor a column, finite, all of one
            size.
        ranks: number of values in a column -> the ranks wanted, 1 the largest; they are moved
            into 1..number.

    Returns:
        For each rank the value in each column; exact, and the same however the values are cut
        into blocks and runs. Nothing where a column is empty.
    """
    upper = _total(walk(lambda blocks: _counted(_upper_halves(columns(b)) for b in blocks)))
    if not upper or not upper[0].any():
        return []
    count = int(upper[0].sum())
    wanted = [min(max(rank, 1), count) for rank in ranks(count)]
    places = [[_locate(counts, rank) for counts in upper] for rank in wanted]
    # each column's bins, of all ranks, one after the other
    bins = [tuple(place for place, _ in column) for column in zip(*places, strict=True)]
    lower = _total(walk(lambda blocks: _counted(_lower_halves(columns(b), bins) for b in blocks)))
    counts = iter(lower)
    by_column = [[next(counts) for _ in wanted] for _ in upper]
    return [
        tuple(
            _value(place, _locate(by_column[column][number], rank)[0])
            for column, (place, rank) in enumerate(rank_places)
        )
        for number, rank_places in enumerate(places)
    ]


def _counted(steps: Iterable[list[_Halves]]) -> list[_Counts]:
    """Histograms, one a column, of the halves in all steps of a run."""
    columns = zip(*steps, strict=True)
    # counted in one go, because a histogram costs as much as many values
    return [np.bincount(np.concatenate(column), minlength=_BINS) for column in columns]


def _total(runs: Iterable[list[_Counts]]) -> list[_Counts]:
    """Adds up histograms; integers, so the order does not matter."""
    total: list[_Counts] = []
    for found in runs:
        if not total:
            total = found
        elif found:
            for counts, more in zip(total, found, strict=True):
                counts += more
    return total


def _upper_halves(values: Sequence[Tensor]) -> list[_Halves]:
    """The upper 16 bits of each value's key, from 0."""
    return [((_keys(tensor) >> 16) + _BINS // 2).astype(np.uint16) for tensor in values]


def _lower_halves(values: Sequence[Tensor], bins: Sequence[tuple[int, ...]]) -> list[_Halves]:
    """The lower 16 bits of the keys that lie in each column's bins, bin after bin."""
    found = []
    for tensor, chosen in zip(values, bins, strict=True):
        keys = _keys(tensor)
        for place in chosen:
            above = (keys - np.int32((place - _BINS // 2) << 16)).view(np.uint32)
            found.append(above[above < _BINS].astype(np.uint16))
    return found


def _keys(values: Tensor) -> _Integers:
    """Integers in the order of the float32 values."""
    bits: _Integers = values.contiguous().view(torch.int32).flatten().numpy()
    if bits.size and bits.min() < 0:  # negative floats count backwards
        return np.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return bits


def _locate(counts: _Counts, rank: int) -> tuple[int, int]:
    """The bin that holds the rank-th largest, and the rank within that bin."""
    above = np.cumsum(counts[::-1])
    place = int(np.searchsorted(above, rank))
    return _BINS - 1 - place, rank - int(above[place] - counts[_BINS - 1 - place])


def _value(upper: int, lower: int) -> float:
    key = np.array([((upper - _BINS // 2) << 16) | lower], np.int32)
    bits = np.where(key < 0, key ^ 0x7FFFFFFF, key).astype(np.int32)
    return float(bits.view(np.float32)[0])
