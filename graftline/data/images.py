"""Images of the starter: real handwritten digits in coloured ink (MNIST, LeCun et al., 1998)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from graftline.data import wording
from graftline.data.drawing import (
    Digits,
    check_sizes,
    class_of,
    held_out_first,
    make_row,
    random_of,
    resize,
)
from graftline.data.encoding import encode_png
from graftline.data.rows import Row

SIDE = 64
COLOURS = {
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "red": (220, 20, 20),
    "green": (0, 130, 30),
    "blue": (20, 40, 220),
    "yellow": (250, 230, 0),
}
PAIRS = (
    ("black", "white"),
    ("red", "white"),
    ("green", "white"),
    ("blue", "white"),
    ("white", "black"),
    ("yellow", "black"),
)
"""Ink and paper; each pair is far apart in brightness."""


def paint(digit: NDArray[np.uint8], ink: str, paper: str) -> NDArray[np.uint8]:
    """Return a digit, uint8 (height, width) with the ink bright, as uint8 (height, width, 3)."""
    share = digit[..., None].astype(np.int64)
    front, back = np.array(COLOURS[ink]), np.array(COLOURS[paper])
    mixed: NDArray[np.int64] = (share * front + (255 - share) * back + 127) // 255
    return mixed.astype(np.uint8)


def generate(split_sizes: Mapping[str, int], seed: int) -> dict[str, list[Row]]:
    """Generate the image rows: 64 x 64 PNG, ten digits, six pairs of ink and paper.

    Args:
        split_sizes: Rows of each split.
        seed: Which digit serves which row, in which colours.

    Returns:
        The rows of each split; no digit serves two splits.

    Raises:
        GraftlineError: A size is not positive, or there are not enough digits.
    """
    check_sizes(split_sizes)
    digits = Digits("image", seed)
    rows: dict[str, list[Row]] = {split: [] for split in split_sizes}
    for split, size in held_out_first(split_sizes):
        for index in range(size):
            rng = random_of(seed, "image", split, index)
            digit = class_of(index, len(wording.DIGITS))
            ink, paper = PAIRS[int(rng.integers(len(PAIRS)))]
            picture, source = digits.take(digit, split)
            media = encode_png(paint(resize(picture, SIDE), ink, paper))
            question = (wording.QUESTION, wording.DIGITS[digit])
            captions = (wording.CAPTION, wording.image_captions(digit, ink, paper))
            rows[split].append(make_row("image", split, index, media, source, question, captions))
    return rows
