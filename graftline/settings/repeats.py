"""Keys that stand twice in a YAML text: a reader keeps the last one and says nothing."""

from __future__ import annotations

from collections.abc import Iterator

import yaml

_MERGE = "tag:yaml.org,2002:merge"
"""Of the key `<<`, which may stand several times."""


def repeated_keys(text: str) -> list[str]:
    """A line for every key that its mapping holds already.

    Raises:
        yaml.YAMLError: it is no YAML.
    """
    found = sorted(_repeats(yaml.compose(text, yaml.SafeLoader), "", set()))
    return [
        f"line {line}: {key} is there again (first in line {first}); keep one"
        for line, first, key in found
    ]


def _repeats(node: yaml.Node | None, where: str, seen: set[int]) -> Iterator[tuple[int, int, str]]:
    """(line, line of the first, dotted key); what an anchor names is looked at once."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for each in node.value:
            yield from _repeats(each, where, seen)
    elif isinstance(node, yaml.MappingNode):
        first: dict[tuple[str, str], int] = {}
        for key, value in node.value:
            yield from _repeats(value, f"{where}{key.value}.", seen)
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
                continue
            line = key.start_mark.line + 1
            if (key.tag, key.value) in first:
                yield line, first[key.tag, key.value], f"{where}{key.value}"
            first.setdefault((key.tag, key.value), line)
