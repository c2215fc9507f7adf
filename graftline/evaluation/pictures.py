"""Pictures of a run: the score matrix as a heat map, and scores over stages as lines.

Drawn with matplotlib's Agg canvas, without pyplot's global state; the same numbers give the same
bytes on the same versions of matplotlib. Pictures are 1200 pixels wide and readable at 800.
Colours: Okabe & Ito (2008) for lines, one-hue Blues for the matrix; both hold for colour-blind
readers, and no fact is told by colour alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from graftline.evaluation import EvaluationError
from graftline.evaluation.bootstrap import Interval
from graftline.evaluation.gains import ModalityScores, StageScores
from graftline.evaluation.style import (
    INK,
    MUTED,
    STYLE,
    label_ends,
    look,
    open_frame,
    save,
    words,
)

_BLUES = LinearSegmentedColormap.from_list(
    "graftline_blues", ["#f4f8fc", "#c9ddf0", "#8fbbdd", "#4a90c2", "#1b5f9e", "#0b3566"]
)
_WIDTH_INCHES, _DOTS_PER_INCH = 8.0, 150


@rc_context(STYLE)
def score_matrix(
    path: Path | str,
    order: Sequence[str],
    scores: StageScores,
    *,
    vanilla: ModalityScores | None = None,
    experts: ModalityScores | None = None,
    title: str = "",
) -> None:
    """Draw `S[i][m]` as a heat map, a row a stage, with V and E as separate rows below.

    The diagonal, to which BRG compares, is outlined. Scores that do not exist stay blank.

    Args:
        path: The PNG to write, atomically.
        order: The modality of each stage.
        scores: `S[i][m]`, from 0 to 1.
        vanilla: `V[m]`; no row if `None`.
        experts: `E[m]`; no row if `None`.
        title: A line above the picture.

    Raises:
        EvaluationError: The order is empty.
        OSError: The file cannot be written.
    """
    count = _check_order(order)
    staged = count == 1 or any(stage < count for stage in scores)
    rows, rule, bottom = _matrix_rows(order, scores, vanilla, experts, staged)
    figure, axes = _figure(1.35 + 0.62 * bottom)
    norm = Normalize(0.0, 1.0)
    for y, _, values in rows:
        for x, modality in enumerate(order):
            if modality in values:
                _cell(axes, x, y, values[modality], norm)
    if bottom > rule:
        axes.axhline(rule, color=MUTED, lw=1.0)
    if staged:
        _outline_diagonal(axes, order, scores, [y for y, _, _ in rows])
    axes.set_xlim(-0.5, count - 0.5)
    axes.set_ylim(bottom + 0.02, 0.48)
    axes.set_xticks(range(count), [words(m) for m in order])
    axes.set_yticks([y for y, _, _ in rows], [label for _, label, _ in rows])
    axes.xaxis.tick_top()
    axes.tick_params(length=0, colors=INK)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(ScalarMappable(norm, _BLUES), ax=axes, fraction=0.035, pad=0.025)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, colors=MUTED, labelsize=10)
    note = "Test score (0 to 1) of each modality."
    note += " Outlined: the score when it was learned." if staged else ""
    _titles(figure, title or "Score matrix", note)
    save(figure, path)


@rc_context(STYLE)
def scores_over_stages(
    path: Path | str,
    order: Sequence[str],
    scores: StageScores,
    *,
    vanilla: ModalityScores | None = None,
    experts: ModalityScores | None = None,
    title: str = "",
) -> None:
    """Draw each modality's score from its stage on, labelled at the line's end.

    Hollow markers are vanilla scores, dashed lines experts.

    Args:
        path: The PNG to write, atomically.
        order: The modality of each stage.
        scores: `S[i][m]`, from 0 to 1.
        vanilla: `V[m]`, or `None`.
        experts: `E[m]`, or `None`.
        title: A line above the picture.

    Raises:
        EvaluationError: The order is empty.
        OSError: The file cannot be written.
    """
    count = _check_order(order)
    figure, axes = _figure(5.0)
    ends: list[tuple[float, str, str]] = []
    seen: list[float] = []
    for index, modality in enumerate(order):
        colour, _ = look(index)
        stages = [i for i in range(1, count + 1) if modality in scores.get(i, {})]
        values = [scores[i][modality] for i in stages]
        references = [known.get(modality) if known else None for known in (vanilla, experts)]
        _line(axes, index, stages, values, references, count)
        seen += [*values, *(value for value in references if value is not None)]
        if stages:
            ends.append((values[-1], modality, colour))
    low = max(0.0, min(seen, default=0.0) - 0.08)
    low, high = (0.0 if low < 0.3 else low), max([1.0, *seen]) + 0.02
    axes.set_ylim(low, high)
    axes.set_xlim(1 - 0.25, count + 0.2)
    label_ends(axes, ends, count + 0.16, (high - low) * 0.062, (low, high))
    axes.set_xticks(range(1, count + 1), [f"{i}\n+ {words(m)}" for i, m in enumerate(order, 1)])
    axes.set_xlabel("stage", color=MUTED)
    open_frame(axes)
    parts = ["Test score of each modality after each stage."]
    parts += ["Hollow: vanilla."] if vanilla else []
    parts += ["Dashed: expert."] if experts else []
    _titles(figure, title or "Scores over stages", " ".join(parts))
    save(figure, path)


@rc_context(STYLE)
def retention_against_storage(
    path: Path | str, points: Sequence[tuple[str, float, Interval]], title: str = ""
) -> None:
    """Draw what each method retains over the bits that it stores, with 95 % intervals.

    Args:
        path: The PNG to write, atomically.
        points: (method, bits a parameter, retention in per cent).
        title: A line above the picture.

    Raises:
        EvaluationError: There is no point.
        OSError: The file cannot be written.
    """
    if not points:
        raise EvaluationError("no method has both a retention and a size: nothing to draw")
    figure, axes = _figure(5.6)
    for number, (name, bits, retention) in enumerate(sorted(points, key=_retained, reverse=True)):
        colour, marker = look(number)
        value = retention.estimate or 0.0
        known = retention.low is not None and retention.high is not None
        spread = [[value - (retention.low or 0.0)], [(retention.high or 0.0) - value]]
        axes.errorbar(
            [bits], [value], yerr=spread if known else None, color=colour, marker=marker, ms=8,
            capsize=3, ls="none", zorder=3, label=f"{name}: {value:.1f} % at {bits:.0f} bits",
        )  # fmt: skip
    axes.set_xlim(0.0, 1.1 * max(bits for _, bits, _ in points))
    axes.set_ylim(0.0, 110.0)
    # Methods that store the same bits lie on one line: names beside the points would cover them.
    axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False, handlelength=1.0)
    axes.axhline(100.0, color=MUTED, lw=1.0, ls=(0, (4, 3)), zorder=1)
    axes.set_xlabel("bits stored for each parameter of the backbone", color=MUTED)
    axes.set_ylabel("retention in %", color=MUTED)
    open_frame(axes)
    _titles(figure, title or "Retention against storage", "Dashed: the experts, each alone.")
    save(figure, path)


def _retained(point: tuple[str, float, Interval]) -> float:
    return point[2].estimate or 0.0


def _matrix_rows(
    order: Sequence[str],
    scores: StageScores,
    vanilla: ModalityScores | None,
    experts: ModalityScores | None,
    staged: bool,
) -> tuple[list[tuple[float, str, ModalityScores]], float, float]:
    """(middle, label, scores) of each row downwards, where stages end, where all ends."""
    rows: list[tuple[float, str, ModalityScores]] = []
    bottom = 0.5
    for stage, added in enumerate(order, start=1):
        if stage in scores:
            bottom += 1.0
            label = f"after stage {stage}\n+ {words(added)}" if staged else "last model"
            rows.append((bottom - 0.5, label, scores[stage]))
    rule = bottom + 0.15
    for name, values in (("vanilla", vanilla), ("expert", experts)):
        if values is not None:
            bottom += 1.0 if bottom > rule else 1.3
            rows.append((bottom - 0.5, name, values))
    return rows, rule, bottom


def _outline_diagonal(
    axes: Axes, order: Sequence[str], scores: StageScores, middles: Sequence[float]
) -> None:
    """Frame the cells in which a modality was learned."""
    stages = sorted(set(scores) & set(range(1, len(order) + 1)))
    heights = dict(zip(stages, middles, strict=False))
    for i, modality in enumerate(order):
        if modality in scores.get(i + 1, {}):
            corner = (i - 0.46, heights[i + 1] - 0.46)
            axes.add_patch(Rectangle(corner, 0.92, 0.92, fill=False, ec=INK, lw=2.5))


def _line(
    axes: Axes,
    index: int,
    stages: Sequence[int],
    values: Sequence[float],
    references: Sequence[float | None],
    count: int,
) -> None:
    """One modality's line, its vanilla score as a hollow marker, its expert's as a dashed line."""
    colour, marker = look(index)
    vanilla, expert = references
    if expert is not None:
        span = [index + 1 - 0.12, count + 0.12]
        axes.plot(span, [expert] * 2, color=colour, lw=1.2, ls=(0, (4, 3)), alpha=0.8)
    axes.plot(stages, values, color=colour, marker=marker, ms=7, lw=2.2, zorder=3)
    if vanilla is not None:
        axes.plot(
            [index + 1 - 0.07], [vanilla], marker=marker, ms=9, mfc="white", mec=colour, mew=1.8,
            ls="none", zorder=4,
        )  # fmt: skip


def _check_order(order: Sequence[str]) -> int:
    if not order:
        raise EvaluationError("the order of modalities is empty: there is nothing to draw")
    return len(order)


def _figure(height_inches: float) -> tuple[Figure, Axes]:
    figure = Figure((_WIDTH_INCHES, height_inches), dpi=_DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _titles(figure: Figure, title: str, note: str) -> None:
    figure.suptitle(title, x=0.015, ha="left", size=15, weight="bold", color=INK)
    figure.supxlabel(note, x=0.015, ha="left", size=11, color=MUTED)


def _cell(axes: Axes, x: float, y: float, value: float, norm: Normalize) -> None:
    axes.add_patch(Rectangle((x - 0.47, y - 0.47), 0.94, 0.94, fc=_BLUES(norm(value)), ec="none"))
    ink = "white" if value > 0.55 else INK
    axes.text(x, y, f"{value:.2f}", ha="center", va="center", color=ink, size=13)
