"""Videos of the starter: one handwritten digit on its way over a dark canvas.

After Moving MNIST (Srivastava et al., "Unsupervised Learning of Video Representations using
LSTMs", 2015), with one digit and a straight way.
"""

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
from graftline.data.encoding import encode_animated_png
from graftline.data.rows import Row

SIDE = 64
FRAMES = 6
FRAME_MILLISECONDS = 160
DIGIT_PIXELS = 42
STEPS = {"slowly": 2, "quickly": 5}
"""Pixels a frame along each axis."""
JITTER = 3
_WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


def way_of(direction: str) -> tuple[int, int]:
    """Return a direction such as `up left` as steps to the right and downwards."""
    parts = [_WAYS[word] for word in direction.split()]
    return sum(part[0] for part in parts), sum(part[1] for part in parts)


def film(
    digit: NDArray[np.uint8], direction: str, speed: str, offset: tuple[int, int]
) -> NDArray[np.uint8]:
    """Draw a digit moving over the canvas.

    Args:
        digit: uint8 (28, 28), the ink bright.
        direction: One of `wording.DIRECTIONS`.
        speed: One of `wording.SPEEDS`.
        offset: Where the middle of the way lies beside the middle of the canvas, in pixels.

    Returns:
        uint8 (FRAMES, SIDE, SIDE), grey.
    """
    glyph = resize(digit, DIGIT_PIXELS)
    right, down = way_of(direction)
    step = STEPS[speed]
    margin = SIDE
    canvas = np.zeros((FRAMES, SIDE + 2 * margin, SIDE + 2 * margin), dtype=np.uint8)
    start = margin + (SIDE - DIGIT_PIXELS) // 2
    for frame in range(FRAMES):
        moved = step * (2 * frame - (FRAMES - 1)) // 2
        left, top = start + offset[0] + right * moved, start + offset[1] + down * moved
        canvas[frame, top : top + DIGIT_PIXELS, left : left + DIGIT_PIXELS] = glyph
    return canvas[:, margin : margin + SIDE, margin : margin + SIDE]


def kind_of(index: int) -> tuple[int, str]:
    """Return digit and direction of a row; 80 pairs of rows hold each combination once."""
    turn = class_of(index, len(wording.DIGITS) * len(wording.DIRECTIONS))
    direction = (turn + turn // 40) % len(wording.DIRECTIONS)
    return turn % len(wording.DIGITS), wording.DIRECTIONS[direction]


def generate(split_sizes: Mapping[str, int], seed: int) -> dict[str, list[Row]]:
    """Generate the video rows: animated PNG, 6 frames of 64 x 64, ten digits, eight directions.

    Args:
        split_sizes: Rows of each split.
        seed: Which digit serves which row, and how it moves.

    Returns:
        The rows of each split; no digit serves two splits.

    Raises:
        GraftlineError: A size is not positive, or there are not enough digits.
    """
    check_sizes(split_sizes)
    digits = Digits("video", seed)
    rows: dict[str, list[Row]] = {split: [] for split in split_sizes}
    for split, size in held_out_first(split_sizes):
        for index in range(size):
            rng = random_of(seed, "video", split, index)
            digit, direction = kind_of(index)
            speed = wording.SPEEDS[int(rng.integers(len(wording.SPEEDS)))]
            shift = rng.integers(-JITTER, JITTER + 1, size=2)
            picture, source = digits.take(digit, split)
            frames = film(picture, direction, speed, (int(shift[0]), int(shift[1])))
            media = encode_animated_png(frames, FRAME_MILLISECONDS)
            asked = (wording.DIRECTION_QUESTION, direction)
            captions = (wording.CAPTION, wording.video_captions(digit, direction, speed))
            rows[split].append(make_row("video", split, index, media, source, asked, captions))
    return rows
