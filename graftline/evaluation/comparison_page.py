"""A comparison as one HTML page that needs nothing beside itself: no script, no address."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from graftline.evaluation.comparison import ComparedMethod
from graftline.evaluation.comparison_pictures import (
    Panel,
    frontier_panel,
    initials,
    order_panels,
    stage_panels,
    svg_of,
)
from graftline.evaluation.comparison_table import (
    TimeSpent,
    cost_table,
    difference_table,
    facts,
    main_table,
    together,
    undefined,
)
from graftline.evaluation.style import words

_TEMPLATE = Path(__file__).with_name("comparison_page.html")


def page(
    recipe: str,
    methods: Sequence[ComparedMethod],
    baseline: str | None,
    time: TimeSpent,
    data_md5: str,
) -> str:
    """The page's text.

    Args:
        recipe: the recipe's name.
        methods: from `compare_runs`.
        baseline: label of the method that differences are taken from.
        time: what the comparison's time went into.
        data_md5: the version of the data.

    Returns:
        HTML; every name and text is escaped.
    """
    first = methods[0]
    frontier = frontier_panel(methods)
    orders = order_panels(methods)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True,
                              lstrip_blocks=True)  # fmt: skip
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        recipe=recipe,
        facts=facts(methods),
        main=main_table(methods),
        differences=difference_table(methods),
        costs=cost_table(methods),
        undefined=undefined(methods),
        baseline=baseline,
        stages=_drawn(stage_panels(methods)),
        frontier=_drawn([frontier] if frontier else []),
        orders=_drawn(orders),
        letters={letter: words(name) for name, letter in initials(first.orders[0]).items()},
        first_order=", ".join(words(name) for name in first.orders[0]),
        shares={name: round(100 * share, 1) for name, share in time.shares().items()},
        spent=together(time) if time.shares() else "",
        data_md5=data_md5,
    )


def _drawn(panels: Sequence[Panel]) -> list[tuple[Panel, str]]:
    """Panels with their pictures, in which matplotlib has escaped every text."""
    return [(panel, svg_of(panel)) for panel in panels]
