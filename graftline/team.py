"""The processes that carry out one step together, as each of them sees it.

Each takes its rows of every batch. Gradients are averaged, so all make the same update. A process
that is alone is a team of one: nothing is sent, and nothing costs anything.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Team:
    """A process's place among those that train together.

    Attributes:
        rank: which one this is, from 0.
        size: how many there are.
        shard: each holds a share of the backbone's weights instead of all of them.
    """

    rank: int = 0
    size: int = 1
    shard: bool = False

    @property
    def first(self) -> bool:
        """Whether this process writes what the team made."""
        return self.rank == 0

    def own(self, work: Sequence[_Item]) -> list[_Item]:
        """This process's part of some work: every `size`-th piece."""
        return list(work[self.rank :: self.size])

    def sums(self, *values: float) -> list[float]:
        """Each number, summed over the team; all get the same."""
        if self.size == 1:
            return list(values)
        summed = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(summed)
        return [float(value) for value in summed]

    def least(self, value: int) -> int:
        """The smallest of the team's numbers."""
        if self.size == 1:
            return value
        found = torch.tensor(value, device=self.device)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MIN)
        return int(found)

    def gathered(self, value: Any) -> list[Any]:
        """Everybody's value, plain data, by rank."""
        if self.size == 1:
            return [value]
        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        length = torch.tensor([len(own)], device=self.device)
        lengths = [torch.empty_like(length) for _ in range(self.size)]
        torch.distributed.all_gather(lengths, length)
        room = torch.zeros(int(max(lengths)), dtype=torch.uint8, device=self.device)
        room[: len(own)] = own
        texts = [torch.empty_like(room) for _ in range(self.size)]
        torch.distributed.all_gather(texts, room)
        return [
            json.loads(bytes(text[: int(count)].tolist()))
            for text, count in zip(texts, lengths, strict=True)
        ]

    def wait(self) -> None:
        """Returns when all have come here."""
        if self.size > 1:
            torch.distributed.barrier()

    def checkpoints(self, work: Path) -> Path:
        """Where this process keeps its checkpoints: one place for all, unless each has a share."""
        return work / f"share-{self.rank + 1}-of-{self.size}" if self.shard else work

    @property
    def device(self) -> torch.device:
        """What this process computes on, and sends from."""
        if torch.distributed.get_backend() == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")


_current = Team()


def current() -> Team:
    """The team of this process."""
    return _current


@contextmanager
def joined(team: Team) -> Iterator[None]:
    """Makes this process one of a team while the context lasts."""
    global _current
    before, _current = _current, team
    try:
        yield
    finally:
        _current = before
