"""Point clouds of the starter: parametric shapes and furniture, sized, turned and noised."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from graftline.data import wording
from graftline.data.drawing import check_sizes, class_of, make_row, random_of
from graftline.data.encoding import encode_ply
from graftline.data.rows import Row
from graftline.data.shapes import SHAPES, between, sample

POINTS = 512
_STRETCH = {"wide": (0.55, 0.75), "tall": (1.3, 1.6)}
_NOISE = {"smooth": (0.0, 0.006), "rough": (0.035, 0.05)}
_SIZE = (0.45, 1.0)
_DECIMALS = 4


def scan(
    shape: str, proportion: str, surface: str, rng: np.random.Generator
) -> tuple[NDArray[np.float32], str]:
    """Draw one point cloud.

    Args:
        shape: One of `shapes.SHAPES`.
        proportion: `wide` or `tall`: the height against the shape's usual one.
        surface: `smooth` or `rough`: noise in shares of the shape's size.
        rng: Random numbers.

    Returns:
        Points, float32 (POINTS, 3), within the unit ball around their middle, in random order,
        the third axis upwards; and the rounded parameters in words.
    """
    surfaces = SHAPES[shape](rng)
    stretch = between(rng, *_STRETCH[proportion])
    noise, size = between(rng, *_NOISE[surface]), between(rng, *_SIZE)
    turn = between(rng, 0.0, 2 * np.pi)
    points = sample(surfaces, POINTS, rng) * np.array([1.0, 1.0, stretch])
    points -= (points.min(axis=0) + points.max(axis=0)) / 2
    points /= np.sqrt((points**2).sum(axis=1)).max()
    points += noise * rng.standard_normal(points.shape)
    cosine, sine = np.cos(turn), np.sin(turn)
    east, north = points[:, 0].copy(), points[:, 1].copy()
    points[:, 0], points[:, 1] = cosine * east - sine * north, sine * east + cosine * north
    points *= size / max(1.0, float(np.sqrt((points**2).sum(axis=1)).max()))
    points = np.round(points[rng.permutation(POINTS)], _DECIMALS) + 0.0
    words = f"shape={shape}:stretch={stretch}:noise={noise}:size={size}:turn={turn}"
    return points.astype(np.float32), words


def generate(split_sizes: Mapping[str, int], seed: int) -> dict[str, list[Row]]:
    """Generate the point-cloud rows: 512 points in a binary PLY, twelve shapes.

    Args:
        split_sizes: Rows of each split.
        seed: The shapes' parameters.

    Returns:
        The rows of each split; each row has its own parameters.

    Raises:
        GraftlineError: A size is not positive.
    """
    check_sizes(split_sizes)
    names = list(SHAPES)
    rows: dict[str, list[Row]] = {split: [] for split in split_sizes}
    for split, size in split_sizes.items():
        for index in range(size):
            rng = random_of(seed, "point_cloud", split, index)
            shape = names[class_of(index, len(names))]
            proportion = wording.PROPORTIONS[int(rng.integers(len(wording.PROPORTIONS)))]
            surface = wording.SURFACES[int(rng.integers(len(wording.SURFACES)))]
            points, source = scan(shape, proportion, surface, rng)
            question = (wording.QUESTION, shape)
            captions = (
                wording.CAPTION,
                wording.point_cloud_captions(shape, proportion, surface),
            )
            rows[split].append(
                make_row(
                    "point_cloud", split, index, encode_ply(points), source, question, captions
                )
            )
    return rows
