"""Surfaces of twelve parametric shapes and pieces of furniture, sampled as points.

Every shape is made of a few surfaces and stands in a box of about -1 to 1; the third axis
points upwards. Points are spread over the surfaces in proportion to their areas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]
Random = np.random.Generator
Surface = tuple[float, Callable[[Random, int], Points]]
"""Area of a surface, and how to draw points on it."""


def box(centre: Sequence[float], size: Sequence[float]) -> Surface:
    """Return the surface of an upright box with a centre (3,) and edges (3,)."""
    middle, edges = np.array(centre, np.float64), np.array(size, np.float64)
    areas = np.array([edges[1] * edges[2], edges[0] * edges[2], edges[0] * edges[1]])

    def draw(rng: Random, count: int) -> Points:
        points = rng.random((count, 3)) - 0.5
        axis = pick(rng, areas, count)
        points[np.arange(count), axis] = np.where(rng.random(count) < 0.5, -0.5, 0.5)
        return points * edges + middle

    return 2 * float(areas.sum()), draw


def sphere(centre: Sequence[float], radius: float) -> Surface:
    """Return a sphere around a centre (3,)."""

    def draw(rng: Random, count: int) -> Points:
        height, angle = 2 * rng.random(count) - 1, 2 * np.pi * rng.random(count)
        across = np.sqrt(1 - height**2)
        points = np.stack([across * np.cos(angle), across * np.sin(angle), height], axis=1)
        return points * radius + np.array(centre, np.float64)

    return 4 * np.pi * radius**2, draw


def frustum(bottom: float, top: float, low: float, high: float) -> Surface:
    """Return the open mantle of a cone between two heights, with a radius at each."""
    slope = float(np.hypot(high - low, bottom - top))

    def draw(rng: Random, count: int) -> Points:
        angle, share = 2 * np.pi * rng.random(count), rng.random(count)
        if bottom != top:
            mixed = bottom**2 + share * (top**2 - bottom**2)
            share = (bottom - np.sqrt(mixed)) / (bottom - top)
        radius = bottom + share * (top - bottom)
        height = low + share * (high - low)
        return np.stack([radius * np.cos(angle), radius * np.sin(angle), height], axis=1)

    return float(np.pi) * (bottom + top) * slope, draw


def disc(radius: float, height: float) -> Surface:
    """Return a flat round plate at a height."""

    def draw(rng: Random, count: int) -> Points:
        angle, across = 2 * np.pi * rng.random(count), radius * np.sqrt(rng.random(count))
        flat = np.full(count, height)
        return np.stack([across * np.cos(angle), across * np.sin(angle), flat], axis=1)

    return float(np.pi) * radius**2, draw


def torus(radius: float, thickness: float) -> Surface:
    """Return a standing ring of a radius, with a tube of a thickness (radius of the tube)."""

    def draw(rng: Random, count: int) -> Points:
        angle, turn = 2 * np.pi * rng.random(count), 2 * np.pi * rng.random(count)
        across = radius + thickness * np.cos(turn)
        side = thickness * np.sin(turn)
        return np.stack([across * np.cos(angle), side, across * np.sin(angle)], axis=1)

    return 4 * float(np.pi) ** 2 * radius * thickness, draw


def triangle(a: Sequence[float], b: Sequence[float], c: Sequence[float]) -> Surface:
    """Return a flat triangle with three corners (3,)."""
    corners = np.array([a, b, c], np.float64)
    area = float(np.linalg.norm(np.cross(corners[1] - corners[0], corners[2] - corners[0]))) / 2

    def draw(rng: Random, count: int) -> Points:
        root, share = np.sqrt(rng.random((count, 1))), rng.random((count, 1))
        first, second, third = 1 - root, root * (1 - share), root * share
        points: Points = first * corners[0] + second * corners[1] + third * corners[2]
        return points

    return area, draw


def pick(rng: Random, weights: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Return `count` indices, drawn in proportion to weights."""
    limits = np.cumsum(weights) / np.sum(weights)
    places: NDArray[np.int64] = np.searchsorted(limits, rng.random(count), side="right")
    return np.minimum(places, len(weights) - 1)


def between(rng: Random, low: float, high: float) -> float:
    """Return a random length between two limits, rounded to thousandths."""
    return round(low + (high - low) * float(rng.random()), 3)


def _legs(x: float, y: float, low: float, high: float, thick: float) -> list[Surface]:
    middle, length = (low + high) / 2, high - low
    places = [(-x, -y), (-x, y), (x, -y), (x, y)]
    return [box((left, front, middle), (thick, thick, length)) for left, front in places]


def _sphere(rng: Random) -> list[Surface]:
    return [sphere((0, 0, 0), 1.0)]


def _box(rng: Random) -> list[Surface]:
    return [box((0, 0, 0), (1.6, between(rng, 1.2, 1.6), 1.6))]


def _cylinder(rng: Random) -> list[Surface]:
    radius = between(rng, 0.65, 0.85)
    return [frustum(radius, radius, -0.9, 0.9), disc(radius, -0.9), disc(radius, 0.9)]


def _cone(rng: Random) -> list[Surface]:
    radius = between(rng, 0.8, 1.0)
    return [frustum(radius, 0.0, -0.9, 0.9), disc(radius, -0.9)]


def _ring(rng: Random) -> list[Surface]:
    return [torus(0.75, between(rng, 0.13, 0.24))]


def _pyramid(rng: Random) -> list[Surface]:
    half, top = between(rng, 0.8, 1.0), (0.0, 0.0, 0.9)
    corners = [(-half, -half, -0.9), (half, -half, -0.9), (half, half, -0.9), (-half, half, -0.9)]
    sides = [triangle(corners[i], corners[(i + 1) % 4], top) for i in range(4)]
    return [*sides, box((0, 0, -0.9), (2 * half, 2 * half, 0.02))]


def _table(rng: Random) -> list[Surface]:
    x, y, thick = between(rng, 0.75, 1.0), between(rng, 0.55, 0.75), between(rng, 0.1, 0.16)
    return [box((0, 0, 0.7), (2 * x, 2 * y, 0.1)), *_legs(x - 0.1, y - 0.1, -0.8, 0.65, thick)]


def _chair(rng: Random) -> list[Surface]:
    half, thick, seat = between(rng, 0.45, 0.55), between(rng, 0.1, 0.15), between(rng, -0.2, 0.0)
    back = box((0, half - 0.05, (seat + 1.0) / 2), (2 * half, 0.08, 1.0 - seat))
    plate = box((0, 0, seat), (2 * half, 2 * half, 0.1))
    return [back, plate, *_legs(half - 0.07, half - 0.07, -1.0, seat, thick)]


def _lamp(rng: Random) -> list[Surface]:
    foot, shade = between(rng, 0.35, 0.5), between(rng, 0.5, 0.65)
    pole = frustum(0.05, 0.05, -0.95, 0.4)
    return [disc(foot, -0.97), pole, frustum(shade, 0.6 * shade, 0.3, 0.95)]


def _bed(rng: Random) -> list[Surface]:
    y, high = between(rng, 0.5, 0.65), between(rng, 0.25, 0.45)
    head, tail = (
        box((-0.95, 0, 0), (0.1, 2 * y, 2 * high)),
        box((0.95, 0, -0.12), (0.1, 2 * y, high)),
    )
    return [
        head,
        tail,
        box((0, 0, -0.15), (1.8, 2 * y, 0.22)),
        box((-0.7, 0, 0.02), (0.35, y, 0.12)),
    ]


def _shelf(rng: Random) -> list[Surface]:
    half, deep = between(rng, 0.55, 0.7), between(rng, 0.3, 0.4)
    boards = [box((0, 0, z), (2 * half, deep, 0.06)) for z in (-0.9, -0.3, 0.3, 0.9)]
    sides = [box((x, 0, 0), (0.06, deep, 1.86)) for x in (-half, half)]
    return [*boards, *sides, box((0, deep / 2, 0), (2 * half, 0.02, 1.86))]


def _ladder(rng: Random) -> list[Surface]:
    half, thick = between(rng, 0.3, 0.4), between(rng, 0.07, 0.11)
    rungs = [box((0, 0, z), (2 * half, thick, thick)) for z in (-0.7, -0.35, 0.0, 0.35, 0.7)]
    return [*rungs, *(box((x, 0, 0), (thick, thick, 2.0)) for x in (-half, half))]


SHAPES: dict[str, Callable[[Random], list[Surface]]] = {
    "sphere": _sphere,
    "box": _box,
    "cylinder": _cylinder,
    "cone": _cone,
    "ring": _ring,
    "pyramid": _pyramid,
    "table": _table,
    "chair": _chair,
    "lamp": _lamp,
    "bed": _bed,
    "shelf": _shelf,
    "ladder": _ladder,
}
"""Name of each shape, and what draws its lengths and returns its surfaces."""


def sample(surfaces: Sequence[Surface], count: int, rng: Random) -> Points:
    """Draw points on surfaces, evenly over their areas.

    Args:
        surfaces: The surfaces of a shape.
        count: Number of points.
        rng: Random numbers.

    Returns:
        float64 (count, 3).
    """
    which = pick(rng, np.array([area for area, _ in surfaces]), count)
    parts = [draw(rng, int((which == i).sum())) for i, (_, draw) in enumerate(surfaces)]
    return np.concatenate(parts)
