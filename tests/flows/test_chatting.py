"""Talking with a finished model."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from typer.testing import CliRunner

from flows import chatting, using
from flows.cli import app
from graftline.asking.asker import Asker
from tasks.models import find_parts
from tests.flows.used import QUIET, RECIPE, echo, medium

pytestmark = pytest.mark.usefixtures("in_used")


def test_a_chat_keeps_its_turns_and_survives_mistakes(monkeypatch):
    monkeypatch.setattr("graftline.asking.asker.answer_batches", echo)
    asker, said, notes = Asker(find_parts(RECIPE, {})), [], io.StringIO()
    chat = chatting.Chat(asker, said.append, Console(file=notes, width=300))
    lines = [
        "/help", f"/image {medium('image')}", "What is this?", "/audio absent.wav", "/dance",
        "/image ~nouser/x.png",
        f'/points "{medium("point_cloud")}"', "And this?", "/image", "", "/quit", "never asked",
    ]  # fmt: skip
    chatting.converse(chat, lines)
    assert said == [turn.answer for turn in chat.turns]
    assert [turn.question for turn in chat.turns] == ["What is this?", "And this?"]
    assert [[s.modality for s in turn.media] for turn in chat.turns] == [["image"], ["point_cloud"]]
    assert said[0] == using.ask(asker, [("image", medium("image"))], "What is this?", QUIET)
    picture = said[0].split()[-1]
    assert picture.startswith("image:")
    assert "What is this?<|im_end|>" in said[1]
    assert "And this?<|im_end|>" in said[1]
    assert picture in said[1].split()[-2:]
    for words in ("/points FILE", "absent.wav: there is no such file", "/dance: no such command",
                  "~nouser/x.png: whose home"):  # fmt: skip
        assert words in notes.getvalue()
    for _ in range(12):  # more than the tiny model's 1024 bytes
        chat.read("why " * 40)
    assert len(chat.turns) < 12
    assert "too long" in notes.getvalue()
    turns = list(chat.turns)
    chat.read("why " * 600)  # fits into no conversation, not even alone
    assert chat.turns == turns and "the conversation takes" in notes.getvalue()
    chat.read("/clear")
    assert chat.turns == []


def test_chat_reads_standard_input(monkeypatch):
    monkeypatch.setattr("graftline.asking.asker.answer_batches", echo)
    lines = f"/image {medium('image')}\nWhat is this?\n"
    result = CliRunner().invoke(app, ["chat", RECIPE], input=lines)
    assert result.exit_code == 0, result.output
    asker = Asker(find_parts(RECIPE, {}))
    expected = using.ask(asker, [("image", medium("image"))], "What is this?", QUIET)
    assert result.stdout == f"{expected}\n"
