"""What all pictures share: colours, markers, frame, labels at the ends of lines, saving.

Colours: Okabe & Ito (2008), which hold for colour-blind readers; no fact is told by colour alone.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from graftline.durable import atomic_write_bytes

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#B8558F", "#8C6D00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK, MUTED, RULE = "#222222", "#666666", "#d0d0d0"
STYLE: dict[Any, Any] = {"font.family": "DejaVu Sans", "font.size": 12, "text.usetex": False}


def look(number: int) -> tuple[str, str]:
    """Colour and marker of a picture's number-th thing: no two of the first 49 share both."""
    turn, place = divmod(number, len(COLOURS))
    return COLOURS[place], MARKERS[(place + turn) % len(MARKERS)]


def words(modality: str) -> str:
    """A modality's name as people write it."""
    return modality.replace("_", " ")


def open_frame(axes: Axes) -> None:
    """Lines across, and no box around them."""
    axes.tick_params(length=0, colors=INK)
    axes.grid(axis="y", color=RULE, lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(RULE)


def label_ends(
    axes: Axes,
    ends: Sequence[tuple[float, str, str]],
    x: float,
    gap: float,
    limits: tuple[float, float],
    size: float = 12,
) -> None:
    """Write each line's name and last score beside its end, at least `gap` apart."""
    ordered = sorted(ends, key=lambda end: (end[0], end[1]))
    heights = [value for value, _, _ in ordered]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    overflow = max(0.0, heights[-1] - (limits[1] - gap / 2)) if heights else 0.0
    ceiling = (heights[-1] - overflow) if heights else 0.0
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], ceiling)
        ceiling = heights[i] - gap
    for height, (value, modality, colour) in zip(heights, ordered, strict=True):
        axes.text(
            x, height, f"{words(modality)} {value:.2f}", color=colour, va="center", size=size,
            weight="bold", clip_on=False, zorder=2,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
        )  # fmt: skip


def save(figure: Figure, path: Path | str) -> None:
    """Write a figure as PNG, atomically; the same figure gives the same bytes."""
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    atomic_write_bytes(path, content.getvalue())
