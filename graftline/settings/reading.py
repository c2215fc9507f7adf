"""Reading a recipe: what is given by hand wins, and all of its problems are listed at once."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from graftline.errors import GraftlineError
from graftline.recipe import OWN, MethodName, Recipe, naming_problems
from graftline.settings.repeats import repeated_keys
from graftline.settings.type_problems import described

_QUOTES = "put a text that only looks like a date or a number in quotes"


class RecipeError(GraftlineError):
    """A recipe that cannot be run; the message lists every problem at once."""


def load_recipe(path: Path | str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Reads and checks a recipe.

    Args:
        path: YAML file.
        overrides: dotted key -> value, e.g. `{"replay.fraction": 0.01}`; wins over the file.

    Raises:
        RecipeError: names the file and every problem (unknown keys with the nearest valid name).
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        content, problems = yaml.safe_load(text), repeated_keys(text)
    except FileNotFoundError as error:
        near = sorted(str(other) for other in path.parent.glob("*.yaml"))
        hint = f" Recipes beside it: {', '.join(near)}." if near else ""
        raise RecipeError(f"{path}: no such recipe.{hint}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: not readable as YAML: {error}") from error
    except ValueError as error:  # 2024-13-45: YAML takes it for a date
        raise RecipeError(f"{path}: not readable as YAML: {error}; {_QUOTES}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values.")
    given = dict(overrides or {})
    for key in [key for key in given if key.partition(".")[0] == "methods"]:
        set_dotted(content, key, given.pop(key))
    method = given.get("method") or content.get("method") or Recipe.model_fields["method"].default
    problems += _own_problems(content)
    own = _own_settings(content).get(str(method), {})
    try:
        recipe = _checked(content, own, given)
        common = _common(content, given, str(method)) if own else recipe
    except _Problems as error:
        told = [line for line in error.lines if f"methods.{method}: {line}" not in problems]
        problems = list(dict.fromkeys([*told, *problems]))
    if problems:
        lines = "\n".join(f"  - {line}" for line in problems)
        raise RecipeError(f"{path}: {len(problems)} problem(s):\n{lines}")
    return recipe.beside(common) if own else recipe


class _Problems(Exception):
    """What is wrong with a recipe, a line each."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__(*lines)
        self.lines = lines


def _own_problems(content: Mapping[str, Any]) -> list[str]:
    """What is wrong with any method's own settings, beyond what is wrong with the file itself."""
    if not _own_settings(content):
        return []
    try:
        _checked(content, {}, {})
        known: Sequence[str] = ()
    except _Problems as error:
        known = error.lines
    problems = []
    for method, own in _own_settings(content).items():
        surplus = sorted(str(key) for key in own if key not in OWN)  # YAML reads `on` as true
        if surplus and method in get_args(MethodName):
            names = ", ".join(surplus)
            problems.append(f"methods.{method}: {names}: not a method's to set ({', '.join(OWN)})")
        elif method in get_args(MethodName):
            try:
                _checked(content, own, {"method": method})
            except _Problems as error:
                new = (line for line in error.lines if line not in known)
                problems += [f"methods.{method}: {line}" for line in new]
    return problems


def _checked(
    content: Mapping[str, Any], own: Mapping[str, Any], overrides: Mapping[str, Any]
) -> Recipe:
    """A file's content, a method's own settings over it, and the overrides over both."""
    merged = _laid_over(content, own)
    for key, value in overrides.items():
        set_dotted(merged, key, value)
    try:
        return Recipe.model_validate(merged)
    except ValidationError as error:
        raise _Problems(_lines(error, merged)) from error


def _lines(error: ValidationError, content: Mapping[str, Any]) -> list[str]:
    """What is wrong with a recipe's parts, and with their names, which come last if at all."""
    problems = error.errors()
    within = {each["loc"][:-1] for each in problems}  # a list is too short without its wrong parts
    kept = [each for each in problems if each["type"] != "too_short" or each["loc"] not in within]
    lines = [line for each in kept for line in described(each, Recipe).splitlines()]
    return lines + (_naming_problems(content) if all(each["loc"] for each in problems) else [])


def _naming_problems(content: Mapping[str, Any]) -> list[str]:
    """What `Recipe` says last, of content whose form is wrong: as far as it has the form."""
    order, modalities = content.get("order"), _mapping(content.get("modalities"))
    listed = order if isinstance(order, list | tuple) else []
    names = [each for each in listed if isinstance(each, str)]
    media = {
        str(name): each.get("media") if isinstance(each, Mapping) else "wrong"
        for name, each in modalities.items()
    }
    estimate = _mapping(content.get("estimate"))
    assumed = {key: map(str, _mapping(estimate.get(key))) for key in ("rows", "row_tokens")}
    return naming_problems(names, media, assumed) if media else []


def _mapping(value: Any) -> Mapping[Any, Any]:
    return value if isinstance(value, Mapping) else {}


def _common(content: Mapping[str, Any], given: Mapping[str, Any], method: str) -> Recipe:
    """The recipe without a method's own settings, of a method that fits every recipe."""
    try:
        return _checked(content, {}, {**given, "method": "finetune"})
    except _Problems as error:
        remedy = f"set it for all methods, not under methods.{method} alone"
        raise _Problems([f"{line}; {remedy}" for line in error.lines]) from error


def _own_settings(content: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Method -> its own settings, as far as the file has the form; `Recipe` says what has not."""
    found = content.get("methods")
    if not isinstance(found, Mapping):
        return {}
    return {str(name): each for name, each in found.items() if isinstance(each, Mapping)}


def _laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `below` in which the values of `above` win, key by key."""
    merged = copy.deepcopy(dict(below))
    for key, value in above.items():
        inner = merged.get(key)
        if isinstance(inner, dict) and isinstance(value, Mapping):
            merged[key] = _laid_over(inner, value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def parse_override(text: str) -> tuple[str, Any]:
    """Splits `key=value` of a command line; the value is read as YAML.

    Raises:
        RecipeError: there is no `=`, or the value is no YAML, or holds a key twice.
    """
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise RecipeError(f"--set {text!r}: write key=value, e.g. replay.fraction=0.01")
    try:
        found, repeats = yaml.safe_load(value), repeated_keys(value)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {text!r}: the value is not YAML: {error}") from error
    except ValueError as error:
        raise RecipeError(f"--set {text!r}: the value is not YAML: {error}; {_QUOTES}") from error
    if repeats:
        raise RecipeError(f"--set {text!r}: {'; '.join(repeats)}")
    return key.strip(), found


def set_dotted(content: dict[str, Any], key: str, value: Any) -> None:
    """Sets the value of a dotted key in nested groups, which are made where they are missing.

    Raises:
        RecipeError: a group on the way is a value.
    """
    *parents, last = key.split(".")
    for name in parents:
        inner = content.setdefault(name, {})
        if not isinstance(inner, dict):
            raise RecipeError(f"--set {key}: {name} is a value, not a group of keys")
        content = inner
    content[last] = value
