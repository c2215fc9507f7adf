"""What a recipe's types find wrong, said such that it can be mended: where, what, what is near."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel

from graftline.settings.models import TAGGED


def described(problem: Any, recipe: type[BaseModel]) -> str:
    """One pydantic problem as a line: where, what, and the nearest valid name.

    What the recipe says as a whole may be several lines, each of which names its keys itself.

    Args:
        problem: of a `ValidationError`.
        recipe: the type that was asked for.
    """
    names = [str(part) for part in problem["loc"]]
    location = [name for name in names if not name.startswith("[")]  # without tags of a choice
    if not names:
        return str(problem["msg"]).removeprefix("Value error, ")
    where = ".".join(location) or "recipe"
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown key{nearest(location[-1], _keys_beside(names, recipe))}"
    if problem["type"] == "literal_error":
        choices = [choice.strip(" '") for choice in _choices(problem)]
        given = str(problem["input"])
        return f"{where}: {given!r} is not one of {', '.join(choices)}{nearest(given, choices)}"
    said = f"{where}: {problem['msg'].removeprefix('Value error, ')}"
    if isinstance(problem["input"], Mapping):  # a whole section
        return said
    return f"{said} (given: {problem['input']!r})"[:400]


def nearest(given: str, valid: Sequence[str]) -> str:
    """`; did you mean ...?`, or nothing where no valid name is near."""
    close = difflib.get_close_matches(given, valid, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _choices(problem: Any) -> list[str]:
    return str(problem["ctx"]["expected"]).replace(" or ", ", ").split(", ")


def _keys_beside(location: Sequence[str], recipe: type[BaseModel]) -> list[str]:
    """The valid keys of the recipe part that holds the last name of `location`."""
    part = recipe
    for name in location[:-1]:
        field = part.model_fields.get(name)
        if field is not None:
            part = next(_parts_in(field.annotation), part)
        elif name in TAGGED:
            part = TAGGED[name]
    return list(part.model_fields)


def _parts_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The parts that a field may hold, itself or as values."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inside in get_args(annotation):
        yield from _parts_in(inside)
