"""Pictures of a comparison: scores over stages, the frontier of gains, forgetting by order.

Each picture is drawn once by matplotlib and written twice: as PNG, and as SVG for the page, whose
colours are names that the page gives a light and a dark meaning.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from graftline.evaluation.bootstrap import Interval
from graftline.evaluation.comparison import ComparedMethod, Order
from graftline.evaluation.style import (
    COLOURS,
    INK,
    MUTED,
    RULE,
    STYLE,
    label_ends,
    look,
    open_frame,
    save,
    words,
)

VARIABLES: Mapping[str, str] = {
    **{colour.lower(): f"var(--series-{number})" for number, colour in enumerate(COLOURS)},
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    RULE: "var(--rule)",
    "#ffffff": "var(--paper)",
}
"""Colour of a picture -> what it is called in the page's style sheet."""
_SMALL: dict[Any, Any] = {**STYLE, "font.size": 8, "svg.fonttype": "none"}
_POINTS_PER_INCH = 72
_COLUMNS = 3
_LEGEND_COLUMNS = 2


@dataclass(frozen=True)
class Panel:
    """One small picture.

    Attributes:
        name: short and unique on the page.
        title: a line above it.
        text: what it shows, in words, for those who cannot see it.
        draw: draws it.
        inches: width and height.
    """

    name: str
    title: str
    text: str
    draw: Callable[[Axes], None]
    inches: tuple[float, float]


def stage_panels(methods: Sequence[ComparedMethod]) -> list[Panel]:
    """A panel a method: each modality's score from its stage on, in the first order."""
    panels = []
    for number, method in enumerate(methods):
        last = method.stages[max(method.stages)]
        text = ", ".join(f"{words(name)} {score[0]:.2f}" for name, score in last.items())
        panels.append(
            Panel(
                f"stages-{number}",
                method.label,
                f"{method.label}: scores after the last stage: {text}",
                lambda axes, method=method: _draw_stages(axes, method),  # type: ignore[misc]
                (3.3, 2.25),
            )
        )
    return panels


def frontier_panel(methods: Sequence[ComparedMethod]) -> Panel | None:
    """BRG against FRG with 95 % intervals; `None` where no method has both."""
    both = [
        method
        for method in methods
        if method.intervals["brg"].estimate is not None
        and method.intervals["frg_mean"].estimate is not None
    ]
    if not both:
        return None
    text = "; ".join(
        f"{method.label}: BRG {method.intervals['brg'].estimate:.1f}, "
        f"FRG {method.intervals['frg_mean'].estimate:.1f}"
        for method in both
    )
    inches = (4.2, 3.5 + 0.17 * -(-len(both) // _LEGEND_COLUMNS))
    return Panel("frontier", "BRG against FRG", text, lambda axes: _frontier(axes, both), inches)


def order_panels(methods: Sequence[ComparedMethod]) -> list[Panel]:
    """A panel a method: BRG by order; none where there is only one order."""
    shown = [method for method in methods if method.rank is not None]
    orders = shown[0].orders if shown else ()
    if len(orders) < 2:
        return []
    values = [v for m in shown for each in m.by_order.values() for v in _ends(each)]
    limits = (min(values, default=0.0) - 2, max([100.0, *values]) + 2)
    names = initials(orders[0])
    panels = []
    for number, method in enumerate(shown):
        text = ", ".join(
            f"{' '.join(words(name) for name in order)} {_words_of(each)}"
            for order, each in method.by_order.items()
        )
        panels.append(
            Panel(
                f"orders-{number}",
                method.label,
                f"{method.label}: BRG by order: {text}",
                lambda axes, method=method: _orders(axes, method, limits, names),  # type: ignore[misc]
                (3.3, 0.65 + 0.2 * len(orders)),
            )
        )
    return panels


def initials(order: Order) -> dict[str, str]:
    """The shortest beginnings that tell modalities apart, in capitals."""
    found = {}
    for name in order:
        length = 1
        while any(other != name and other[:length] == name[:length] for other in order):
            length += 1
        found[name] = name[:length].upper()
    return found


@rc_context(_SMALL)
def svg_of(panel: Panel) -> str:
    """A panel as an inline SVG element whose colours are variables of the page.

    Returns:
        `<svg ...>...</svg>`; no address, no prolog, ids that begin with the panel's name.
    """
    figure = _figure(*panel.inches)
    panel.draw(figure.add_subplot())
    content = io.StringIO()
    empty = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context({"svg.hashsalt": panel.name}):
        figure.savefig(content, format="svg", transparent=True, metadata=empty)
    text = content.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'id="(?=[\w-])', f'id="{panel.name}-', text)
    text = re.sub(r"(?<=#)(?=[\w-]+[\")])(?![0-9a-f]{6}\b)", f"{panel.name}-", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, variable)
    width, height = (round(inch * _POINTS_PER_INCH, 1) for inch in panel.inches)
    return re.sub(
        r"<svg[^>]*>",
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-hidden="true">',
        text,
        count=1,
    ).strip()


@rc_context(_SMALL)
def save_panels(path: Path | str, panels: Sequence[Panel], title: str, note: str) -> None:
    """Write panels side by side as one PNG, atomically.

    Args:
        path: the PNG to write.
        panels: at least one, of equal size.
        title: a line above them.
        note: a line below them.

    Raises:
        OSError: the file cannot be written.
    """
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    width, height = panels[0].inches
    figure = _figure(columns * width, rows * (height + 0.3) + 0.75)
    for number, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, number)
        panel.draw(axes)
        if len(panels) > 1:
            axes.set_title(panel.title, loc="left", size=10, color=INK, weight="bold")
    figure.suptitle(title, x=0.01, ha="left", size=12, weight="bold", color=INK)
    figure.supxlabel(note, x=0.01, ha="left", size=9, color=MUTED)
    save(figure, path)


def _figure(width: float, height: float) -> Figure:
    figure = Figure((width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _draw_stages(axes: Axes, method: ComparedMethod) -> None:
    order, ends = method.orders[0], list[tuple[float, str, str]]()
    for number, modality in enumerate(order):
        colour, marker = look(number)
        stages = [stage for stage in sorted(method.stages) if modality in method.stages[stage]]
        spread = [method.stages[stage][modality] for stage in stages]
        means = [mean for mean, _, _ in spread]
        axes.vlines(stages, [low for _, low, _ in spread], [high for _, _, high in spread],
                    color=colour, lw=1.0, alpha=0.6)  # fmt: skip
        axes.plot(stages, means, color=colour, marker=marker, ms=4, lw=1.5)
        ends.append((means[-1], modality, colour))
    axes.set_ylim(0.0, 1.02)
    axes.set_xlim(0.8, len(order) + 0.15)
    label_ends(axes, ends, len(order) + 0.15, 0.105, (0.0, 1.02), size=8)
    axes.set_xticks(range(1, len(order) + 1))
    axes.set_yticks([0.0, 0.5, 1.0])
    axes.set_xlabel("stage", color=MUTED)
    open_frame(axes)


def _frontier(axes: Axes, methods: Sequence[ComparedMethod]) -> None:
    for number, method in enumerate(methods):
        brg, frg = method.intervals["brg"], method.intervals["frg_mean"]
        colour, marker = look(number)
        assert brg.estimate is not None
        assert frg.estimate is not None
        axes.errorbar(
            [frg.estimate], [brg.estimate], xerr=_error(frg), yerr=_error(brg), color=colour,
            marker=marker, ms=5, lw=1.0, capsize=2, ls="none", zorder=3, label=method.label,
        )  # fmt: skip
    axes.axhline(100.0, color=MUTED, lw=0.8, ls=(0, (4, 3)), zorder=1)
    axes.axvline(100.0, color=MUTED, lw=0.8, ls=(0, (4, 3)), zorder=1)
    axes.margins(0.06)
    axes.set_xlabel("FRG in % (learning the new)", color=MUTED)
    axes.set_ylabel("BRG in % (keeping the old)", color=MUTED)
    open_frame(axes)
    axes.grid(axis="x", color=RULE, lw=0.8)
    # The best lie close together: names beside the points would cover them.
    axes.legend(
        loc="upper left", bbox_to_anchor=(0.0, -0.15), ncols=_LEGEND_COLUMNS, frameon=False,
        fontsize=8, handlelength=1.0, labelcolor="linecolor", borderaxespad=0.0,
    )  # fmt: skip


def _orders(
    axes: Axes, method: ComparedMethod, limits: tuple[float, float], names: Mapping[str, str]
) -> None:
    for place, (_, each) in enumerate(method.by_order.items()):
        if each.estimate is not None:
            axes.errorbar(
                [each.estimate], [place], xerr=_error(each), color=COLOURS[0], marker="o", ms=4,
                lw=1.2, capsize=2, ls="none", zorder=3,
            )  # fmt: skip
    axes.axvline(100.0, color=MUTED, lw=0.8, ls=(0, (4, 3)), zorder=1)
    labels = [" ".join(names[name] for name in order) for order in method.by_order]
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlim(*limits)
    axes.set_xlabel("BRG in %", color=MUTED)
    open_frame(axes)


def _error(each: Interval) -> list[list[float]] | None:
    if each.estimate is None or each.low is None or each.high is None:
        return None
    # a resampled mean may lie beside the estimate altogether where rows are few
    return [[max(0.0, each.estimate - each.low)], [max(0.0, each.high - each.estimate)]]


def _ends(each: Interval) -> list[float]:
    return [value for value in (each.low, each.estimate, each.high) if value is not None]


def _words_of(each: Interval) -> str:
    return "n/a" if each.estimate is None else f"{each.estimate:.1f}"
