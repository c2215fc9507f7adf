"""Which row goes into which split: given, or drawn so that one medium never serves two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from graftline.data.rows import SPLITS
from graftline.data.sources.entries import Entry
from graftline.errors import GraftlineError
from graftline.settings.sources import FractionSettings

_LISTED = 5
COLUMNS = ("entry", "place", "split", "digest", "group", "task", "question", "answers")


@dataclass
class Placed:
    """The texts of a source, each with its split.

    Attributes:
        rows: number of an entry -> (split, task, question, answers, source) of its rows.
        problems: the same medium in two given splits; `file, row: what`.
        warnings: what is worth knowing.
    """

    rows: dict[int, list[tuple[str, str, str, list[str], str]]]
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


class Texts:
    """The texts of a source without its media: small enough for memory."""

    def __init__(self) -> None:
        self._rows: list[tuple[object, ...]] = []

    def add(self, number: int, entry: Entry) -> None:
        """Notes a good entry."""
        if entry.medium is None:
            return
        head = (number, entry.place, entry.split, entry.medium.digest, entry.group)
        for text in entry.texts:
            self._rows.append((*head, text.task, text.question, text.answers))

    def table(self) -> pd.DataFrame:
        """A row a text, in order, with the columns `COLUMNS`."""
        return pd.DataFrame(self._rows, columns=list(COLUMNS), dtype=object)


def place(texts: pd.DataFrame, fractions: FractionSettings) -> Placed:
    """Gives every text its split, and joins those that ask the same of the same medium.

    Rows that name a split keep it. If every split is named by some row, the rest is trained on;
    otherwise the missing splits are drawn from all rows that are not held out already, whole media
    (and groups) at a time.

    Args:
        texts: of `Texts.table`.
        fractions: how many media a split gets where none is given, and the seed.

    Raises:
        GraftlineError: there are too few media to fill three splits.
    """
    if texts.empty:
        return Placed({})
    texts = texts.assign(unit=_units(texts))
    named = texts["split"].notna()
    missing = [split for split in SPLITS if not (texts["split"] == split).any()]
    if "train" in missing and len(missing) < len(SPLITS) and named.all():
        raise GraftlineError("no row is for training; name rows of the split train")
    held = set(texts.loc[texts["split"].isin(["validation", "test"]), "unit"])
    free = [unit for unit in texts["unit"].unique() if unit not in held]
    drawn = _draw(free, [split for split in missing if split != "train"], fractions)
    rest = texts["unit"].map(lambda unit: drawn.get(unit, "train"))
    movable = ~named | (texts["split"] == "train")
    texts["split"] = texts["split"].where(~movable, rest)
    texts["source"] = [
        f"group:{group}" if group is not None else f"sha256:{digest[:32]}"
        for group, digest in zip(texts["group"], texts["digest"], strict=True)
    ]
    problems = _shared(texts)
    joined = texts.groupby(["split", "digest", "task", "question"], sort=False)
    first = joined.head(1).assign(answers=joined["answers"].agg(_union).tolist())
    rows: dict[int, list[tuple[str, str, str, list[str], str]]] = {}
    columns = ["entry", "split", "task", "question", "answers", "source"]
    for number, split, task, question, answers, source in first[columns].itertuples(index=False):
        rows.setdefault(int(number), []).append((split, task, question, answers, source))
    return Placed(rows, problems, unseen_answers(first))


def _union(answers: pd.Series) -> list[str]:
    return list(dict.fromkeys(text for listed in answers for text in listed))


def _units(texts: pd.DataFrame) -> NDArray[Any]:
    """A number for what must stay together: texts of one medium or one group, chains included."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    media, names = pd.factorize(texts["digest"])
    groups, labels = pd.factorize(texts["group"])  # -1 where there is none
    linked = groups >= 0
    count = len(names) + len(labels)
    edges = (media[linked], len(names) + groups[linked])
    graph = coo_array((np.ones(int(linked.sum()), np.int8), edges), shape=(count, count))
    _, component = connected_components(graph, directed=False)
    found: NDArray[Any] = component[media]
    return found


def _draw(
    units: Sequence[int], splits: Sequence[str], fractions: FractionSettings
) -> dict[int, str]:
    """Unit -> held-out split, for the splits that no row names."""
    if not splits:
        return {}
    if len(units) <= len(splits):
        raise GraftlineError(
            f"{len(units)} media (or groups) that are not held out; "
            f"{' and '.join(splits)} and train need one each at least"
        )
    generator = np.random.Generator(np.random.PCG64([fractions.seed, len(units)]))
    order = [units[place] for place in generator.permutation(len(units))]
    found: dict[int, str] = {}
    start = 0
    for split in splits:
        wanted = max(1, round(getattr(fractions, split) * len(units)))
        stop = min(start + wanted, len(units) - 1 - (len(splits) - 1 - splits.index(split)))
        found |= dict.fromkeys(order[start:stop], split)
        start = stop
    return found


def _shared(texts: pd.DataFrame) -> list[str]:
    """Rows whose medium or group serves another split before them."""
    problems = []
    for column, what in (("digest", "the same medium"), ("group", "the group")):
        known = texts[texts[column].notna()]
        first = known.groupby(column)[["split", "place"]].transform("first")
        for number in known.index[known["split"] != first["split"]]:
            row = known.loc[number]
            named = what if column == "digest" else f"{what} {row['group']!r}"
            problems.append(
                f"{row['place']}: {named} is also in the split {first.loc[number, 'split']} "
                f"({first.loc[number, 'place']})"
            )
    return list(dict.fromkeys(problems))


def unseen_answers(rows: pd.DataFrame) -> list[str]:
    """A warning where questions of the test rows have answers that no training row has.

    Args:
        rows: with `split`, `task`, `answers` and `place`.
    """
    asked = rows[rows["task"] == "question"]
    trained = {
        text for listed in asked.loc[asked["split"] == "train", "answers"] for text in listed
    }
    found: dict[str, str] = {}
    for listed, where in asked.loc[asked["split"] == "test", ["answers", "place"]].itertuples(
        index=False
    ):
        if not trained.intersection(listed):
            found.setdefault(listed[0], where)
    if not found:
        return []
    shown = [f"{text!r} ({where})" for text, where in list(found.items())[:_LISTED]]
    more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    return [f"answers that only the test split has: {', '.join(shown)}{more}"]
