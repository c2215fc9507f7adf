"""A recipe to begin with: choices are written out, defaults shown behind `#`, or left out."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import annotated_types
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from graftline.recipe import KINDS, ModalitySettings, Recipe
from graftline.settings.models import STARTERS
from graftline.settings.reading import RecipeError, load_recipe
from graftline.settings.type_problems import nearest

CONNECTOR = {"tokens": 4, "hidden": 64}
SETTINGS: Mapping[str, Any] = {
    "align": {"steps": 12, "batch_size": 8, "learning_rate": 2e-4},
    "fine_tune": {
        "steps": 40,
        "batch_size": 16,
        "learning_rate": 3e-4,
        "connector_learning_rate": 1e-4,
        "checkpoint_every": 20,
    },
    "realign": {"steps": 80, "batch_size": 8, "learning_rate": 3e-4},
    "replay": {"fraction": 0.1},
    "evaluation": {"batch_size": 200, "max_new_tokens": 16},
    "execution": {"slots": 2},
}
"""What the starter takes; tried there on validation rows [ours]."""
_HEAD = """\
# A Graftline recipe. Price it: graftline plan FILE    Carry it out: graftline run FILE
# A line whose key stands right behind a # shows a default: to change it, take the # away, and that
# of its section. The rates and lengths are the starter's; other data want their own.
"""
_BRIEF_HEAD = """\
# The rates and lengths are the starter's; other data want their own. `graftline init` without
# --brief shows every key with what it means.
"""


def draft(
    name: str,
    method: str,
    modalities: Sequence[str],
    backbone: str,
    data_folder: str = "data",
    sources: Mapping[str, str] | None = None,
    *,
    brief: bool = False,
) -> str:
    """A recipe as YAML with a comment at every key, from the descriptions in `graftline.recipe`.

    Args:
        name: of the recipe.
        method: how the modalities are added.
        modalities: in the order in which they are learned; `name:kind` where the name does not
            say what the media are.
        backbone: source of the LLM.
        data_folder: where the rows lie.
        sources: modality -> folder with its media and metadata.csv or metadata.jsonl.
        brief: write what was chosen alone, a line a section.

    Raises:
        RecipeError: lists everything that does not fit together.
    """
    kinds = dict(_named(each) for each in modalities)
    folders = sources or {}
    if problems := _unknown(kinds, folders):
        raise RecipeError("\n".join(problems))
    given: dict[str, Any] = {
        "name": name,
        "method": method,
        "order": [_named(each)[0] for each in modalities],
        "modalities": {
            each: {
                "encoder": STARTERS.get(kind, kind),
                **({} if kind == each else {"media": kind}),
                **({"data": {"folder": folders[each]}} if each in folders else {}),
                "connector": CONNECTOR,
            }
            for each, kind in kinds.items()
        },
        "data": {"folder": data_folder},
        "backbone": {"source": backbone},
        **SETTINGS,
    }
    lines = _choices_alone(given, 0) if brief else _section(Recipe, given, 0)
    text = (_BRIEF_HEAD if brief else _HEAD) + "\n".join(lines) + "\n"
    _check(text)
    return text


def _named(word: str) -> tuple[str, str]:
    """(name, kind) of `name:kind`, or of a name that is a kind."""
    name, _, kind = word.partition(":")
    return name, kind or name


def _unknown(kinds: Mapping[str, str], folders: Mapping[str, str]) -> list[str]:
    """Kinds of media that there are not, and sources of no modality, by their options."""
    problems = []
    if unknown := [kind for kind in kinds.values() if kind not in KINDS]:
        near = nearest(unknown[0], list(KINDS)) or "."
        problems.append(
            f"--modalities: {', '.join(unknown)} not known{near} There are: {', '.join(KINDS)}; "
            "write name:kind for a modality of another name"
        )
    if astray := [name for name in folders if name not in kinds]:
        problems.append(
            f"--source: {', '.join(astray)} not among --modalities ({', '.join(kinds)}); add a "
            f"modality of your own there as name:kind, e.g. {astray[0]}:image"
        )
    return problems


def _check(text: str) -> None:
    """Loads the text as a recipe.

    Raises:
        RecipeError: as `load_recipe`, without the name of a file that is not there yet.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        try:
            load_recipe(path)
        except RecipeError as error:
            raise RecipeError(str(error).replace(str(path), "the new recipe")) from error


def _section(part: type[BaseModel], given: Mapping[str, Any] | None, depth: int) -> list[str]:
    """The lines of a recipe part; all of them behind `#` where nothing of it is given."""
    lines = []
    for name, field in part.model_fields.items():
        inner, value = _part_of(field), (given or {}).get(name)
        mark = "" if given is not None and name in given else "#"
        if inner is not None:
            lines += ["", *_comment(inner, depth)] if depth == 0 else []
            lines.append(f"{'  ' * depth}{mark}{name}:")
            lines += _section(inner, value, depth + 1)
        elif name == "modalities":
            lines += ["", *_comment(ModalitySettings, depth), f"{'  ' * depth}{name}:"]
            for modality, settings in (value or {}).items():
                lines.append(f"{'  ' * (depth + 1)}{modality}:")
                lines += _section(ModalitySettings, settings, depth + 2)
        else:
            lines += [""] if depth == 0 and lines and lines[-1].startswith("  ") else []
            shown = value if not mark else field.get_default(call_default_factory=True)
            lines.append(_line(name, shown, field, mark, depth))
    return lines


def _choices_alone(given: Mapping[str, Any], depth: int) -> list[str]:
    """A line a key; modalities, and what each of them is made of, a line each."""
    lines = []
    for name, value in given.items():
        if name == "modalities" or depth == 1:
            lines += [f"{'  ' * depth}{name}:", *_choices_alone(value, depth + 1)]
        else:
            lines.append(f"{'  ' * depth}{name}: {_flow(value)}")
    return lines


def _flow(value: Any) -> str:
    """A value as YAML in one line."""
    listed = [list(value) if isinstance(value, tuple) else value]
    text: str = yaml.safe_dump(listed, default_flow_style=True, width=10_000, sort_keys=False)
    return text.strip()[1:-1]


def _part_of(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _comment(part: type[BaseModel], depth: int) -> list[str]:
    first = (part.__doc__ or "").strip().splitlines()[0]
    return [f"{'  ' * depth}# {first}"]


def _line(name: str, value: Any, field: FieldInfo, mark: str, depth: int) -> str:
    text = f"{'  ' * depth}{mark}{name}: {_flow(value)}"
    note = "; ".join(filter(None, [field.description, _choices(field), _bounds(field)]))
    return f"{text}  # {note}" if note else text


def _choices(field: FieldInfo) -> str:
    """The values that a key may take, where they are few and named."""
    kind = field.annotation
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind))
    literals = [each for each in get_args(kind) if get_origin(each) is Literal]
    inner = [name for each in literals for name in get_args(each)]
    return "of " + ", ".join(dict.fromkeys(inner)) if inner else ""


def _bounds(field: FieldInfo) -> str:
    words = {
        annotated_types.Ge: ("ge", "at least"),
        annotated_types.Gt: ("gt", "more than"),
        annotated_types.Le: ("le", "at most"),
        annotated_types.Lt: ("lt", "less than"),
    }
    return ", ".join(
        f"{phrase} {getattr(limit, attribute):g}"
        for limit in field.metadata
        for kind, (attribute, phrase) in words.items()
        if isinstance(limit, kind)
    )
