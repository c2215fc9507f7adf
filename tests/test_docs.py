"""Pages that people read: the reference is the code's, links lead somewhere, commands exist."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command

from flows.cli import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def _anchors(page: Path) -> set[str]:
    """What a page's headings can be called, as GitHub calls them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}


def _commands(page: Path) -> Iterator[str]:
    """Lines of code blocks, and code in tables, that call the command line."""
    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip().startswith("graftline "):
                yield line.strip()
    for row in re.findall(r"^\| `(graftline [^`]*)`", text, re.MULTILINE):
        yield re.sub(r"[\[\]]|\.\.\.", " ", row)


def test_the_reference_is_what_the_code_says() -> None:
    file = ROOT / "docs" / "reference.py"
    specification = importlib.util.spec_from_file_location("reference", file)
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    found = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    assert module.page() == found, "run `python docs/reference.py`"
    assert "| `fraction` |" in found and "#### `graftline combine`" in found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            assert target.startswith("https://"), target
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in _anchors(file), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist_with_their_options(page: Path) -> None:
    for line in _commands(page):
        words = shlex.split(line.partition(" | ")[0], comments=True)[1:]
        command: Any = get_command(app)
        while hasattr(command, "get_command"):
            name = words.pop(0)
            found = command.get_command(typer.Context(command), name)
            assert found is not None, f"{page.name}: {line}"
            command = found
        command.make_parser(typer.Context(command)).parse_args(words)
