"""Writes docs/reference.md: every key of a recipe by its types, every command by its options.

Run it from the project's folder: `python docs/reference.py`.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import typer.cli
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from typer.main import get_command

from flows.cli import app
from graftline.merging.rules import RULES
from graftline.recipe import Recipe

PAGE = Path(__file__).with_name("reference.md")


def page() -> str:
    """The page's text."""
    lines = [
        "# Reference",
        "",
        "Made by `python docs/reference.py` from types and the command line; what each",
        "thing is for stands in the other pages.",
        "",
        "## Recipe",
        "",
        "Keys of `params/*.yaml`. `--set KEY=VALUE` overrides one, with dots between levels.",
    ]
    for title, model in _sections(Recipe, ""):
        lines += ["", f"### {title or 'top level'}", ""]
        lines += [f"{_first_line(model)}", ""] if _first_line(model) else []
        lines += _table(model)
    lines += ["", "## Merge rules", ""]
    lines += [
        "What `compose.parameters.RULE` and `merge.parameters` take, and `--set` of `merge` and",
        "`combine`.",
    ]
    for name, rule in RULES.items():
        lines += ["", f"### {name}", ""]
        lines += _table(rule.parameters) if rule.parameters.model_fields else ["Nothing."]
    lines += ["", "## Commands", ""]
    command = get_command(app)
    context = typer.Context(command, info_name="graftline")
    text = typer.cli.get_docs_for_click(obj=command, ctx=context, name="graftline")
    lines += [f"##{line}" if line.startswith("#") else line for line in text.splitlines()]
    return "\n".join(line.rstrip() for line in lines).rstrip() + "\n"


def _sections(model: type[BaseModel], title: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """Every part of a recipe once, by the key under which it stands first."""
    waiting, seen = [(title, model)], set()
    while waiting:
        title, model = waiting.pop(0)
        if model in seen:
            continue
        seen.add(model)
        yield title, model
        for name, field in model.model_fields.items():
            for part in _parts(field.annotation):
                kinds = {get_origin(each) for each in _all(field.annotation)}
                many = "*" if kinds & {dict, tuple, list} else ""
                waiting.append((".".join(filter(None, [title, name, many])), part))


def _all(annotation: Any) -> Iterator[Any]:
    yield annotation
    for each in get_args(annotation):
        yield from _all(each)


def _parts(annotation: Any) -> list[type[BaseModel]]:
    types_in = (each for each in _all(annotation) if isinstance(each, type))
    return [each for each in types_in if issubclass(each, BaseModel)]


def _table(model: type[BaseModel]) -> list[str]:
    rows = [_row(name, field) for name, field in model.model_fields.items()]
    return ["| key | type | default | what it is |", "|---|---|---|---|", *rows]


def _row(name: str, field: FieldInfo) -> str:
    required = field.is_required()
    default = "required" if required else _default(field)
    said = field.description or " ".join(map(_first_line, _parts(field.annotation)))
    cells = [f"`{name}`", _type(field), default, said]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "its parts'"
    return "" if value in (None, "", (), {}) else f"`{value}`"


def _type(field: FieldInfo) -> str:
    bounds = [
        f"{sign} {getattr(each, attribute)}"
        for each in field.metadata
        for attribute, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))
        if getattr(each, attribute, None) is not None
    ]
    return ", ".join([_name(field.annotation), *bounds])


def _name(annotation: Any) -> str:
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is typing.Annotated:
        return _name(inside[0])
    if origin is typing.Literal:
        return " | ".join(str(each) for each in inside)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(dict.fromkeys(_name(each) for each in inside))
    if origin is dict:
        return f"{_name(inside[0])} → {_name(inside[1])}"
    if origin in (tuple, list):
        return f"list of {_name(inside[0])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "part"
    names = {type(None): "nothing", str: "text", bool: "yes or no", int: "integer", float: "number"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _first_line(model: type[BaseModel]) -> str:
    return (model.__doc__ or "").strip().partition("\n")[0]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
