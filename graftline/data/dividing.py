"""Features of a split in shares that machines encode apart, and one of them joins."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from graftline.team import Team, joined


@dataclass(frozen=True)
class _Apart(Team):
    """A place among shares that nobody waits for: each is encoded where and when it can be.

    Attributes:
        joins: this process joins them all when it has come to the first one.
    """

    joins: bool = False

    @property
    def first(self) -> bool:
        """Whether this process writes what all shares make."""
        return self.joins and self.rank == 0

    def wait(self) -> None:
        """Returns at once."""


@contextmanager
def only_share(number: int, count: int) -> Iterator[None]:
    """Share `number` of 1..`count` is encoded, and nothing is joined, while the context lasts."""
    with joined(_Apart(number - 1, count)):
        yield


def every_share(count: int) -> Iterator[None]:
    """Encodes all shares one after another; at the last one that comes they are joined.

    Those that are finished are not encoded again.
    """
    for rank in reversed(range(count)):
        with joined(_Apart(rank, count, joins=True)):
            yield


def share_name(number: int, count: int) -> str:
    """What the files of a share are called."""
    return f"share-{number}-of-{count}"
