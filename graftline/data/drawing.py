"""What the generators share: seeded random numbers, the turn of tasks and classes, digits."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from graftline.data.parts import MNIST_5K, fetch
from graftline.data.rows import TASKS, Row
from graftline.errors import GraftlineError

DIGIT_SIDE = 28
_HALVES = {"image": 0, "video": 1}


def random_of(seed: int, *names: str | int) -> np.random.Generator:
    """Return a generator that depends on a seed and on names, and on nothing else."""
    numbers = [zlib.crc32(str(name).encode()) for name in names]
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, *numbers])))


def class_of(index: int, classes: int) -> int:
    """Return the class of a row: rows come in pairs (question, caption) of one class."""
    return (index // len(TASKS)) % classes


def make_row(
    modality: str,
    split: str,
    index: int,
    media: bytes,
    source: str,
    question: tuple[str, str],
    captions: tuple[str, Sequence[str]],
) -> Row:
    """Make a row: even ones ask the question, odd ones for a caption.

    Args:
        modality: For the id.
        split: For the id.
        index: Number of the row in its split.
        media: Encoded bytes.
        source: The raw material.
        question: Prompt and answer of the question.
        captions: Prompt and reference captions; the first one is trained on.

    Returns:
        The row.
    """
    task = TASKS[index % len(TASKS)]
    if task == "question":
        prompt, answers = question[0], [question[1]]
    else:
        prompt, answers = captions[0], list(captions[1])
    return Row(f"{modality}-{split}-{index:05d}", media, task, prompt, answers, source)


@lru_cache(maxsize=1)
def _read_digits(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return pictures (digits, 28, 28), white on black, and labels (digits,)."""
    try:
        with gzip.open(path, "rt", encoding="ascii") as stream:
            values = np.loadtxt(stream, delimiter=",", dtype=np.uint8)
        pictures = values[:, :-1].reshape(-1, DIGIT_SIDE, DIGIT_SIDE)
    except (OSError, EOFError, ValueError) as error:
        raise GraftlineError(f"{path} is not the table of digits: {error}") from error
    return pictures, values[:, -1]


class Digits:
    """Real handwritten digits: one serves a single split, and rows of it in turn.

    Held-out splits are to be served first: each of their rows has a digit of its own. Training
    rows share what is left, so a digit comes back in another ink or on another way.

    Args:
        modality: `image` or `video`: each has its own half of the digits.
        seed: Which digits belong to which half and split.
    """

    def __init__(self, modality: Literal["image", "video"], seed: int) -> None:
        self._modality = modality
        self._pictures, labels = _read_digits(fetch(MNIST_5K))
        self._free: list[list[int]] = []
        self._training: list[list[int]] = [[] for _ in range(10)]
        for digit in range(10):
            order = random_of(seed, "digits", digit).permutation(np.flatnonzero(labels == digit))
            middle = len(order) // 2
            half = order[:middle] if _HALVES[modality] == 0 else order[middle:]
            self._free.append([int(index) for index in half[::-1]])

    def take(self, digit: int, split: str) -> tuple[NDArray[np.uint8], str]:
        """Return the picture, uint8 (28, 28), and the source of a digit.

        Raises:
            GraftlineError: No such digit is left for the split.
        """
        free, training = self._free[digit], self._training[digit]
        if free:
            index = free.pop()
        elif split == "train" and training:
            index = training.pop(0)
        else:
            raise GraftlineError(
                f"no handwritten {digit} is left for the {split} split of the {self._modality} "
                "data; held-out rows have one each, and training needs some. Ask for fewer rows "
                "(at most 2,000 held-out ones)."
            )
        if split == "train":
            training.append(index)
        return self._pictures[index], f"mnist-5k:{index}"


def held_out_first(split_sizes: Mapping[str, int]) -> list[tuple[str, int]]:
    """Return splits and their sizes in the order in which `Digits` serves them."""
    return sorted(split_sizes.items(), key=lambda item: (item[0] == "train", item[0]))


def resize(picture: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Return a grey picture, uint8 (height, width), scaled to (side, side) with antialiasing."""
    scaled = Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(scaled, dtype=np.uint8)


def check_sizes(sizes: Mapping[str, int]) -> None:
    """Refuse sizes that are not whole numbers above zero.

    Raises:
        GraftlineError: A size is zero or negative.
    """
    for split, size in sizes.items():
        if size < 1:
            raise GraftlineError(f"the size of split {split!r} is {size}; it must be at least 1")
