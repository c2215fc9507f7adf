"""A contact sheet of a modality: a few rows as pictures, with what is asked and answered."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from graftline.data.kinds import decode_media
from graftline.data.rows import SAMPLE_RATE, SPLITS
from graftline.data.streaming import open_parquet
from graftline.evaluation.style import INK, MUTED, STYLE, save, words

COLUMNS, LINES = 4, 3
_INCHES = (3.0, 3.4)
_TOP, _BELOW = 0.6, 0.75  # inches for the titles, and for the texts of the last line
_FRAMES = 4
_POINTS = 2_000
_TEXT_WIDTH, _TEXT_LINES = 34, 2


@dataclass(frozen=True)
class Example:
    """A row that is shown.

    Attributes:
        id: of the row.
        media: its bytes.
        question: the prompt.
        answers: accepted ones.
    """

    id: str
    media: bytes
    question: str
    answers: tuple[str, ...]


def examples_of(folder: Path, count: int = COLUMNS * LINES) -> list[Example]:
    """The first rows of each split, of different media as far as possible, in equal shares.

    Args:
        folder: holds `<split>.parquet`.
        count: rows in all.
    """
    found = []
    for split in SPLITS:
        path = folder / f"{split}.parquet"
        if path.is_file():
            found += _first(path, count // len(SPLITS))
    return found


def _first(path: Path, count: int) -> list[Example]:
    shown: dict[bytes, Example] = {}
    columns = ["id", "media", "question", "answers"]
    for batch in open_parquet(path).iter_batches(batch_size=16, columns=columns):
        for row in batch.to_pylist():
            if not (row.get("media") and row.get("answers")):
                continue  # `validate` names it
            question = str(row.get("question") or "")
            one = Example(str(row.get("id")), row["media"], question, tuple(row["answers"]))
            shown.setdefault(one.media, one)
            if len(shown) == count:
                return list(shown.values())
    return list(shown.values())


@rc_context(STYLE)
def contact_sheet(path: Path, modality: str, kind: str, examples: Sequence[Example]) -> None:
    """Draws rows: pictures as they are, sounds as spectrogram and waveform, four frames of
    videos, point clouds as points, features as a map.

    Args:
        path: the PNG to write, atomically.
        modality: for the title.
        kind: what the media are.
        examples: whose media can be decoded.
    """
    lines = max(1, -(-len(examples) // COLUMNS))
    height = _INCHES[1] * lines + _TOP
    figure = Figure((_INCHES[0] * COLUMNS, height), dpi=100)
    FigureCanvasAgg(figure)
    title = words(modality) if modality == kind else f"{words(modality)} ({words(kind)})"
    figure.text(0.015, 1 - 0.08 / height, title, va="top", size=15, color=INK)
    top, bottom = 1 - _TOP / height, _BELOW / height
    grid = figure.add_gridspec(
        lines, COLUMNS, left=0.01, right=0.99, top=top, bottom=bottom, hspace=0.45, wspace=0.06
    )
    for number, example in enumerate(examples):
        _draw(figure, grid[number // COLUMNS, number % COLUMNS], kind, example)
    with warnings.catch_warnings():  # a script that the font does not have is shown as boxes
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        save(figure, path)


def _draw(figure: Figure, cell: Any, kind: str, example: Example) -> None:
    values = decode_media(example.media, kind)
    axes: Any
    if kind == "point_cloud":
        axes = figure.add_subplot(cell, projection="3d")
        _points(axes, values)
    else:
        axes = figure.add_subplot(cell)
        {"image": _picture, "video": _film, "audio": _sound, "features": _map}[kind](axes, values)
        axes.set_xticks([])
        axes.set_yticks([])
    title = f"{example.id}, {_size(values, kind)}"
    text = f"{_short(example.question)}\n{_short(' / '.join(example.answers))}"
    axes.set_title(title, size=8, color=MUTED, parse_math=False)
    write = axes.text2D if kind == "point_cloud" else axes.text
    write(0.5, -0.02, text, **_under(axes))


def _under(axes: Any) -> dict[str, Any]:
    return {
        "transform": axes.transAxes, "ha": "center", "va": "top", "size": 9, "color": INK,
        "parse_math": False,
    }  # fmt: skip


def _short(text: str) -> str:
    """Two lines of a text at most."""
    lines = textwrap.wrap(text, _TEXT_WIDTH, max_lines=_TEXT_LINES, placeholder=" …")
    return "\n".join(lines)


def _size(values: NDArray[Any], kind: str) -> str:
    if kind == "audio":
        return f"{len(values) / SAMPLE_RATE:.2f} s"
    if kind == "point_cloud":
        return f"{len(values)} points"
    if kind == "features":
        return f"{values.shape[0]} tokens of {values.shape[1]}"
    height, width = values.shape[-3:-1]
    return f"{width} x {height}" + (f", {len(values)} frames" if kind == "video" else "")


def _picture(axes: Any, values: NDArray[Any]) -> None:
    axes.imshow(values)


def _film(axes: Any, values: NDArray[Any]) -> None:
    """Four frames from the first to the last, line by line."""
    chosen = values[np.linspace(0, len(values) - 1, _FRAMES).round().astype(int)]
    framed = np.pad(chosen, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=128)
    first, second = (np.concatenate(list(half), axis=1) for half in (framed[:2], framed[2:]))
    axes.imshow(np.concatenate([first, second]))


def _sound(axes: Any, values: NDArray[Any]) -> None:
    """Spectrogram up to 8 kHz, and the waveform below it."""
    quiet = values + np.random.Generator(np.random.PCG64(0)).normal(0, 1e-5, len(values))
    seconds = len(values) / SAMPLE_RATE
    axes.specgram(quiet, NFFT=400, Fs=SAMPLE_RATE, noverlap=240, cmap="magma")
    times = np.linspace(0.0, seconds, len(values))
    axes.plot(times, -2_000 + 1_800 * values, color=INK, lw=0.4)
    axes.set_xlim(0.0, seconds)
    axes.set_ylim(-4_000, SAMPLE_RATE / 2)


def _points(axes: Any, values: NDArray[Any]) -> None:
    some = values[:: max(1, len(values) // _POINTS)]
    axes.scatter(some[:, 0], some[:, 1], some[:, 2], c=some[:, 2], s=2, cmap="viridis")
    axes.set_aspect("equal")
    axes.set_axis_off()


def _map(axes: Any, values: NDArray[Any]) -> None:
    axes.imshow(values.astype(np.float32), aspect="auto", cmap="viridis")
