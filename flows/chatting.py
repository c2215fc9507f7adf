"""`graftline chat`: a conversation line by line, with media between the questions."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from rich.console import Console

from flows.using import show
from graftline.asking.asker import Asker, TooLong
from graftline.asking.conversation import Shown, Turn, check_question
from graftline.errors import GraftlineError

_NAMES = {"point_cloud": "points"}
"""Modalities whose command has another name."""


class Chat:
    """The state of a conversation: the turns so far, and the media for the next question.

    Args:
        asker: the model.
        say: prints an answer.
        console: for notes, help and errors.
    """

    def __init__(self, asker: Asker, say: Callable[[str], None], console: Console) -> None:
        self.turns: list[Turn] = []
        self.media: list[Shown] = []
        self._asker, self._say, self._console = asker, say, console
        self._commands = {_NAMES.get(name, name): name for name in asker.modalities}

    def read(self, line: str) -> bool:
        """Carries out one line; what goes wrong is said, and the conversation goes on.

        Returns:
            Whether the conversation goes on.
        """
        text = line.strip()
        if text in ("/quit", "/exit"):
            return False
        try:
            if text.startswith("/"):
                self._command(text)
            elif text:
                self._ask(text)
        except GraftlineError as error:
            self._note(str(error), "red")
        return True

    def _command(self, text: str) -> None:
        name, _, rest = text[1:].partition(" ")
        if name == "help":
            self._note(self.help())
        elif name == "clear":
            self.turns, self.media = [], []
            self._note("forgotten: the conversation starts anew")
        elif self._asker.shows(word := self._commands.get(name, name)):
            path = rest.strip().strip("\"'")
            if not path:
                raise GraftlineError(f"/{name} FILE: name a file")
            pair = (self._asker.called(word), _file(path))
            self.media += show(self._asker, [pair], self._console)
            self._note(f"{path}: goes with the next question")
        else:
            raise GraftlineError(f"/{name}: no such command. {self.help()}")

    def help(self) -> str:
        """The commands, in one line."""
        media = ", ".join(f"/{name} FILE" for name in self._commands)
        return f"{media}: shows a file with the next question; /clear, /help, /quit."

    def _ask(self, text: str) -> None:
        turn = Turn(tuple(self.media), check_question(text))
        kept = self.turns
        while True:
            try:
                self._asker.encode([*kept, turn])
                break
            except TooLong:
                if not kept:
                    raise
                kept = kept[1:]
        if left_out := len(self.turns) - len(kept):
            self._note(f"too long for this model: the first {left_out} turn(s) are left out")
        [answer] = self._asker.answer([[*kept, turn]])
        self.turns = [*kept, Turn(turn.media, turn.question, answer)]
        self.media = []
        self._say(answer)

    def _note(self, text: str, style: str = "dim") -> None:
        self._console.out(text, style=style, highlight=False)


def _file(path: str) -> Path:
    """A path as it is typed; `~` is home, as in a shell."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise GraftlineError(
            f"{path}: whose home that is nobody knows; write the whole path"
        ) from error


def converse(chat: Chat, lines: Iterable[str]) -> None:
    """Carries out lines until they end or one of them says so."""
    for line in lines:
        if not chat.read(line):
            return


def typed_lines(console: Console) -> Iterator[str]:
    """Lines from standard input, with a prompt where a person types them."""
    person = sys.stdin.isatty()
    while True:
        if person:
            console.print("> ", end="")
        line = sys.stdin.readline()
        if not line:
            return
        yield line
