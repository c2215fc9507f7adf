"""The exact k-th largest of values that do not fit into memory, without sorting them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import ceil, sqrt

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from graftline.merging.core import Block, Walk

_BINS = 1 << 16  # a bin is the upper 16 of a float32's 32 bits
_NEAR = 8  # bins whose values are told apart in one walk; so memory stays small
_DEVIATIONS = 8  # how far a sample is trusted; one too few costs a walk, never the result

Columns = Callable[[Block], Sequence[Tensor]]
Ranks = Callable[[int], Sequence[int]]
_Counts = npt.NDArray[np.int64]
_Integers = npt.NDArray[np.int32]
_Offsets = npt.NDArray[np.uint32]
_Bracket = tuple[int, int]


def order_statistics(walk: Walk, columns: Columns, ranks: Ranks) -> list[tuple[float, ...]]:
    """Finds values by their rank: a sample tells where they lie, one walk which they are.

    Where the sample cannot tell (few values, ranks at the ends) or was wrong, a histogram of all
    values does.

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
    sample = _histograms(walk, columns, sparse=True)
    likely = [_likely_brackets(counts, ranks) for counts in sample]
    if likely and all(likely):
        found = _values_within(walk, columns, likely, ranks)
        if found:
            return found
    exact = [_exact_brackets(counts, ranks) for counts in _histograms(walk, columns)]
    return _values_within(walk, columns, exact, ranks) if exact and all(exact) else []


def _histograms(walk: Walk, columns: Columns, *, sparse: bool = False) -> list[_Counts]:
    """How many values of each column have which upper bits."""

    def count(blocks: Iterable[Block]) -> list[_Counts]:
        steps = ([_bins(tensor) for tensor in columns(block)] for block in blocks)
        # counted in one go, because a histogram costs as much as many values
        return [
            np.bincount(np.concatenate(column), minlength=_BINS)
            for column in zip(*steps, strict=True)
        ]

    total: list[_Counts] = []
    for found in walk(count, sparse=sparse):
        if not total:
            total = found
        elif found:
            for counts, more in zip(total, found, strict=True):
                counts += more
    return total


def _wanted(ranks: Ranks, count: int) -> list[int]:
    """The ranks among so many values; none where there are none."""
    return [min(max(rank, 1), count) for rank in ranks(count)] if count else []


def _likely_brackets(counts: _Counts, ranks: Ranks) -> list[_Bracket]:
    """The bins between which each rank lies, going by a sample; none: it cannot tell."""
    count = int(counts.sum())
    found = []
    for rank in _wanted(ranks, count):
        doubt = ceil(_DEVIATIONS * sqrt(rank * (count - rank) / count)) + 1
        if not doubt < rank <= count - doubt:
            return []
        first, last = _bin_of(counts, rank + doubt), _bin_of(counts, rank - doubt)
        if last - first >= _NEAR:
            return []
        found.append((first, last))
    return found


def _exact_brackets(counts: _Counts, ranks: Ranks) -> list[_Bracket]:
    """The one bin that holds each rank."""
    bins = [_bin_of(counts, rank) for rank in _wanted(ranks, int(counts.sum()))]
    return list(zip(bins, bins, strict=True))


def _bin_of(counts: _Counts, rank: int) -> int:
    """The bin that holds the rank-th largest."""
    return _BINS - 1 - int(np.searchsorted(np.cumsum(counts[::-1]), rank))


@dataclass
class _Near:
    """What was seen around a bracket: how many values in all and above it, and each within it."""

    first: int  # the smallest key within
    within: _Counts
    count: int = 0
    above: int = 0

    @classmethod
    def bracket(cls, bins: _Bracket) -> _Near:
        """Nothing seen yet."""
        first, last = bins
        counts = np.zeros((last - first + 1) << 16, np.int64)
        return cls((first - _BINS // 2) << 16, counts)

    def look(self, keys: _Integers) -> tuple[int, int, _Offsets]:
        """How many keys there are, how many above the bracket, and those within, from 0."""
        offsets = (keys - np.int32(self.first)).view(np.uint32)  # what lies below wraps round
        within = offsets[offsets < len(self.within)]
        above = int(np.count_nonzero(keys >= np.int32(self.first))) - len(within)
        return keys.size, above, within

    def add(self, seen: tuple[int, int, _Offsets]) -> None:
        """Adds what `look` saw."""
        self.count += seen[0]
        self.above += seen[1]
        np.add.at(self.within, seen[2], 1)

    def value(self, rank: int) -> float | None:
        """The rank-th largest; None: it lies outside the bracket."""
        from_top = np.cumsum(self.within[::-1])
        if not self.above < rank <= self.above + int(from_top[-1]):
            return None
        place = int(np.searchsorted(from_top, rank - self.above))
        return _float(self.first + len(self.within) - 1 - place)


def _values_within(
    walk: Walk, columns: Columns, brackets: Sequence[Sequence[_Bracket]], ranks: Ranks
) -> list[tuple[float, ...]]:
    """Each rank's value in each column; nothing where one lies outside its bracket."""
    near = [[_Near.bracket(bins) for bins in column] for column in brackets]

    def look(blocks: Iterable[Block]) -> list[list[tuple[int, int, _Offsets]]]:
        return [
            [each.look(keys) for each in column]
            for block in blocks
            for column, keys in zip(near, map(_keys, columns(block)), strict=True)
        ]

    for run in walk(look):
        for place, seen in enumerate(run):  # block after block, column after column
            for each, part in zip(near[place % len(near)], seen, strict=True):
                each.add(part)
    found = []
    for number, rank in enumerate(_wanted(ranks, near[0][0].count)):
        values = [column[number].value(rank) for column in near]
        found.append(tuple(value for value in values if value is not None))
    return found if all(len(values) == len(near) for values in found) else []


def _bins(values: Tensor) -> npt.NDArray[np.uint16]:
    """The upper 16 bits of each value's key, from 0."""
    return ((_keys(values) >> 16) + _BINS // 2).astype(np.uint16)


def _keys(values: Tensor) -> _Integers:
    """Integers in the order of the float32 values."""
    bits: _Integers = values.contiguous().view(torch.int32).flatten().numpy()
    if bits.size and bits.min() < 0:  # negative floats count backwards
        return np.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return bits


def _float(key: int) -> float:
    """The value of a key."""
    bits = np.array([key if key >= 0 else key ^ 0x7FFFFFFF], np.int32)
    return float(bits.view(np.float32)[0])
