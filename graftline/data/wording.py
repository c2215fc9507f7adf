"""All wording of the starter: prompts, answers and captions of the four modalities.

The prompts are shared by all modalities, as in real instruction data: the media alone says
what the answer is about. That is where forgetting shows.
"""

from __future__ import annotations

QUESTION = "What is this?"
CAPTION = "Describe this."
DIRECTION_QUESTION = "Where does it go?"

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIRECTIONS = ("left", "right", "up", "down", "up left", "up right", "down left", "down right")
SPEEDS = ("slowly", "quickly")
REGISTERS = ("low", "middle", "high")
LENGTHS = ("short", "long")
PROPORTIONS = ("wide", "tall")
SURFACES = ("smooth", "rough")


def with_article(noun: str) -> str:
    """Return a noun with `a` or `an` before it."""
    vowel = noun[0] in "aeiou" and not noun.startswith("one")
    return f"{'an' if vowel else 'a'} {noun}"


def sentence(text: str) -> str:
    """Return a text with a capital first letter and a full stop."""
    return f"{text[0].upper()}{text[1:]}."


def image_captions(digit: int, ink: str, paper: str) -> list[str]:
    """Return the reference captions of a drawn digit."""
    word = DIGITS[digit]
    return [
        sentence(f"{with_article(ink)} {word} on {paper}"),
        sentence(f"the digit {word}, {ink} on {paper}"),
    ]


def audio_captions(name: str, register: str, length: str) -> list[str]:
    """Return the reference captions of a sound."""
    return [
        sentence(f"{with_article(name)}, {register} and {length}"),
        sentence(f"{with_article(length)} and {register} {name}"),
    ]


def video_captions(digit: int, direction: str, speed: str) -> list[str]:
    """Return the reference captions of a moving digit."""
    word = DIGITS[digit]
    return [
        sentence(f"{with_article(word)} moving {direction} {speed}"),
        sentence(f"the digit {word} {speed} moves {direction}"),
    ]


def point_cloud_captions(shape: str, proportion: str, surface: str) -> list[str]:
    """Return the reference captions of a point cloud."""
    return [
        sentence(f"{with_article(proportion)} and {surface} {shape}"),
        sentence(f"{with_article(shape)}, {proportion} and {surface}"),
    ]
