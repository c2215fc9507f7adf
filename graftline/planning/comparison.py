"""What a comparison runs: which methods, in which orders of modalities, with which seeds.

Orders and seeds are the same for every method, so that differences between methods are paired.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any, get_args

from graftline.errors import GraftlineError
from graftline.recipe import ContinualName, MethodName
from graftline.settings.type_problems import nearest

METHODS: tuple[str, ...] = get_args(MethodName)
CONTINUAL: tuple[str, ...] = get_args(ContinualName)
BASELINE = "mera"
"""The method that the others' differences are taken from."""
ORDERS = ("default", "latin", "all")
Order = tuple[str, ...]


class ComparisonError(GraftlineError):
    """A comparison that cannot be made; the message lists every problem at once."""


@dataclass(frozen=True)
class WantedRun:
    """One run of a comparison."""

    method: str
    order: Order
    seed: int

    def changes(self, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """What the run overrides in its recipe: dotted key -> value."""
        own = {"method": self.method, "order": list(self.order), "seed": self.seed}
        return {**overrides, **own}


@dataclass(frozen=True)
class Comparison:
    """The runs of a comparison: every method in the same places.

    Attributes:
        methods: names, without repetition.
        places: (order, seed) of every method's runs, the recipe's own order first.
    """

    methods: tuple[str, ...]
    places: tuple[tuple[Order, int], ...]

    @property
    def orders(self) -> tuple[Order, ...]:
        """The orders, each once."""
        return tuple(dict.fromkeys(order for order, _ in self.places))

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds, each once."""
        return tuple(dict.fromkeys(seed for _, seed in self.places))

    def runs(self) -> Iterator[WantedRun]:
        """Every run, method by method within a place: what they share is computed early."""
        for order, seed in self.places:
            for method in self.methods:
                yield WantedRun(method, order, seed)


def comparison_of(
    usual: Order,
    methods: Sequence[str],
    seeds: str,
    orders: str = "default",
    order_seeds: str | None = None,
) -> Comparison:
    """Reads what a comparison is asked for.

    Args:
        usual: the recipe's order of modalities.
        methods: names of methods; every continual one if empty.
        seeds: numbers with commas between them.
        orders: `default` (the recipe's), `latin` (each modality once in each place), `all`, or
            orders with semicolons between them, modalities with commas.
        order_seeds: the seeds of other orders than the recipe's; the same if `None`.

    Raises:
        ComparisonError: lists every unknown or repeated method, seed and modality, with the nearest
            valid name.
    """
    problems: list[str] = []
    chosen = tuple(name.strip() for name in methods) or CONTINUAL
    problems += _unknown("method", chosen, METHODS) + _repeated("methods", chosen)
    own = _numbers("seeds", seeds, problems)
    other = own if order_seeds is None else _numbers("order seeds", order_seeds, problems)
    wanted = _orders(usual, orders, problems)
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise ComparisonError(f"the comparison has {len(problems)} problem(s):\n{listed}")
    ordered = sorted(wanted, key=lambda order: order != usual)  # stable: only the usual one moves
    places = [(order, seed) for order in ordered for seed in (own if order == usual else other)]
    return Comparison(chosen, tuple(places))


def latin_orders(usual: Order) -> list[Order]:
    """As many orders as modalities, in which each modality stands once in each place.

    The first is the usual order. With an even number of modalities each one also follows each
    other one exactly once (Williams 1949, "Experimental designs balanced for the estimation of
    residual effects of treatments").
    """
    count = len(usual)
    zigzag = [(place + 1) // 2 if place % 2 else -(place // 2) % count for place in range(count)]
    name = {number: usual[place] for place, number in enumerate(zigzag)}
    return [tuple(name[(n + shift) % count] for n in zigzag) for shift in range(count)]


def prefix_stages(orders: Iterable[Order]) -> int:
    """How many stages a method computes for these orders: what begins alike is computed once.

    64 for all 24 orders of four modalities (4 + 12 + 24 + 24), not 96.
    """
    return len({order[:stage] for order in orders for stage in range(1, len(order) + 1)})


def _orders(usual: Order, text: str, problems: list[str]) -> list[Order]:
    if text == "default":
        return [usual]
    if text == "latin":
        return latin_orders(usual)
    if text == "all":
        return list(permutations(usual))
    orders = [tuple(name.strip() for name in one.split(",")) for one in text.split(";")]
    if any(len(order) == 1 for order in orders) and len(usual) > 1:
        words = "; ".join(",".join(order) for order in orders if len(order) == 1)
        near = nearest(words, ORDERS)
        problems.append(
            f"orders: {words!r} is none of {', '.join(ORDERS)}, and no list of all modalities such "
            f"as {','.join(usual)}{near}"
        )
        return []
    for order in orders:
        where = f"order {','.join(order)}"
        problems += _unknown(f"{where}: modality", order, usual) + _repeated(where, order)
        missing = [name for name in usual if name not in order]
        if missing:
            problems.append(f"{where}: {', '.join(missing)} is missing")
    return list(dict.fromkeys(orders))


def _numbers(what: str, text: str, problems: list[str]) -> list[int]:
    found = []
    for part in (part.strip() for part in str(text).split(",")):
        if not part.isdecimal():
            problems.append(f"{what}: {part!r} is no whole number from 0; write e.g. 0,1,2")
            continue
        found.append(int(part))
    problems += _repeated(what, [str(number) for number in found])
    return found


def _unknown(what: str, given: Sequence[str], valid: Sequence[str]) -> list[str]:
    return [
        f"{what}: {name!r} is not one of {', '.join(valid)}{nearest(name, valid)}"
        for name in dict.fromkeys(given)
        if name not in valid
    ]


def _repeated(what: str, given: Sequence[str]) -> list[str]:
    twice = sorted({name for name in given if given.count(name) > 1})
    return [f"{what}: {', '.join(twice)} more than once"] if twice else []
