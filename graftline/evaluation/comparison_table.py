"""A comparison as Markdown and CSV, and the fields that its page shows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from graftline.evaluation.bootstrap import Interval
from graftline.evaluation.cells import JOINT, csv_text
from graftline.evaluation.comparison import LEARNED, PERPLEXITY, ComparedMethod
from graftline.evaluation.style import words

DASH = "–"
_GAINS = {"brg": "BRG", "frg_mean": "FRG", "retention": "retention"}
_COSTS_READ = (
    "Costs. Bytes a modality: what answering needs beyond one backbone. Bytes kept to learn: what "
    "learning the last modality read of earlier stages beside their model (kept rows, statistics, "
    "logits, Fisher information, older models). Seconds depend on what the machine did besides."
)
_UNITS = ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k"))


@dataclass(frozen=True)
class Field:
    """One field of a row.

    Attributes:
        value: the number or word itself.
        spread: its 95 % interval, in brackets; may be empty.
        apart: whether the interval excludes zero (differences alone).
    """

    value: str
    spread: str = ""
    apart: bool = False

    @property
    def text(self) -> str:
        """Value and interval."""
        return f"{self.value} {self.spread}".strip()


@dataclass(frozen=True)
class TimeSpent:
    """What a comparison's time went into.

    Attributes:
        computing: activity -> seconds of all its steps, each counted once.
        wall_seconds: what the runs took that recorded it; 0 if none did.
        idle_seconds: the part of that in which no step computed.
    """

    computing: Mapping[str, float]
    wall_seconds: float = 0.0
    idle_seconds: float = 0.0

    def shares(self) -> dict[str, float]:
        """Activity -> share of the time from 0 to 1; `orchestration` is where nothing computes."""
        total = sum(self.computing.values())
        idle = self.idle_seconds / self.wall_seconds if self.wall_seconds else 0.0
        if not total:
            return {}
        shares = {name: (1.0 - idle) * value / total for name, value in self.computing.items()}
        return shares | ({"orchestration": idle} if self.wall_seconds else {})


def main_table(methods: Sequence[ComparedMethod]) -> tuple[list[str], list[list[Field]]]:
    """Headings and rows: gains in per cent, scores times 100, each with its 95 % interval."""
    columns = _columns(methods)
    return [heading for heading, _ in columns], [
        [field(method) for _, field in columns] for method in methods
    ]


def cost_table(methods: Sequence[ComparedMethod]) -> tuple[list[str], list[list[Field]]]:
    """Headings and rows of what each method costs, and of how much was scored."""
    columns = {
        "trained_parameters": "trained parameters",
        "stored_bytes_per_modality": "bytes a modality",
        "carried_bytes": "bytes kept to learn",
        "replay_rows": "replay rows",
        "training_seconds": "training seconds",
    }
    rows = []
    for method in methods:
        fields = [Field(method.label), *(_cost(method.costs[name], name) for name in columns)]
        fields += [Field(str(method.n)), Field(str(method.n_joint)), Field(str(method.runs))]
        fields += [Field(", ".join(map(str, method.seeds))), Field(str(len(method.orders)))]
        rows.append(fields)
    counted = ["n", "n of joint questions", "runs", "seeds", "orders"]
    return ["method", *columns.values(), *counted], rows


def difference_table(
    methods: Sequence[ComparedMethod],
) -> tuple[list[str], list[list[Field]]]:
    """Headings and rows of the paired differences; no row for the baseline."""
    names = {**_GAINS, PERPLEXITY: "text perplexity", JOINT: "joint questions"}
    names |= {f"scores.{m}": words(m) for m in methods[0].orders[0]}
    rows = []
    for method in methods:
        if method.differences:
            fields = [Field(method.label)]
            for name in names:
                factor = 1.0 if name in (*_GAINS, PERPLEXITY) else 100.0
                fields.append(_difference(method.differences.get(name), factor))
            rows.append(fields)
    return ["method", *names.values()], rows


def markdown(methods: Sequence[ComparedMethod], baseline: str | None, time: TimeSpent) -> str:
    """All tables as Markdown."""
    first = methods[0]
    lines = [*facts(methods), ""]
    lines += _markdown_table(*main_table(methods))
    headings, rows = difference_table(methods)
    if rows:
        lines += ["", f"Differences from `{baseline}`, paired by test rows and runs; bold where"
                  " the 95 % interval excludes 0:", ""]  # fmt: skip
        lines += _markdown_table(headings, rows)
    lines += ["", _COSTS_READ, "", *_markdown_table(*cost_table(methods))]
    lines += ["", *undefined(methods)] if undefined(methods) else []
    lines += ["", spent(time)] if time.shares() else []
    if len(first.orders) > 1:
        lines += ["", "Orders: " + "; ".join(_order(order) for order in first.orders) + "."]
    return "\n".join(lines) + "\n"


def comparison_csv(methods: Sequence[ComparedMethod], baseline: str | None) -> str:
    """Every number with both ends of its interval, a row a method, in the units of reports."""
    rows: list[dict[str, object]] = []
    for method in methods:
        row: dict[str, object] = {
            "rank": method.rank,
            "method": method.label,
            "n": method.n,
            "n_joint": method.n_joint,
            "runs": method.runs,
            "seeds": " ".join(map(str, method.seeds)),
            "orders": "; ".join(" ".join(order) for order in method.orders),
        }
        for name, each in method.intervals.items():
            row |= {name: each.estimate, f"{name}_low": each.low, f"{name}_high": each.high}
        row |= {name: value for name, value in method.costs.items() if name != "idle_seconds"}
        for name, each in method.differences.items():
            key = f"{name}_minus_{baseline}"
            row |= {key: each.estimate, f"{key}_low": each.low, f"{key}_high": each.high}
        rows.append(row)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return csv_text(columns, [[row.get(name) for name in columns] for row in rows])


def facts(methods: Sequence[ComparedMethod]) -> list[str]:
    """What all rows share, in sentences."""
    first = methods[0]
    seeds = ", ".join(map(str, first.seeds))
    orders = "order " + _order(first.orders[0])
    if len(first.orders) > 1:
        orders = f"{len(first.orders)} orders"
    asked = f" and {first.n_joint} joint questions" if first.n_joint else ""
    before = first.text_perplexity_before
    text = f" Text perplexity before: {before:.1f}." if before is not None else ""
    return [
        f"{first.runs} run{'s' * (first.runs > 1)} a method: seed{'s' * (len(first.seeds) > 1)} "
        f"{seeds}, {orders}; n = {first.n} test rows a run{asked}. Means over runs, 95 % bootstrap "
        f"intervals over test rows and runs, ranked by BRG where retention is {LEARNED:.0f} at "
        f"least.{text}"
    ]


def undefined(methods: Sequence[ComparedMethod]) -> list[str]:
    """Why fields of the headlines are empty; methods of one reason in one sentence."""
    found: dict[str, list[str]] = {}
    for method in methods:
        for name, heading in _GAINS.items():
            if name in method.undefined:
                found.setdefault(method.undefined[name], []).append(f"{heading} of {method.label}")
    return [f"No {', '.join(names)}: {reason}." for reason, names in found.items()]


def spent(time: TimeSpent) -> str:
    """The shares of the comparison's time in one sentence."""
    parts = [f"{name} {100 * share:.1f} %" for name, share in time.shares().items()]
    return f"Time: {', '.join(parts)}. {together(time)}"


def together(time: TimeSpent) -> str:
    """The sum of all steps' time in one sentence."""
    hours = sum(time.computing.values()) / 3600.0
    return f"All steps together took {hours:.2f} hours, one after another."


def _columns(
    methods: Sequence[ComparedMethod],
) -> list[tuple[str, Callable[[ComparedMethod], Field]]]:
    columns: list[tuple[str, Callable[[ComparedMethod], Field]]] = [
        ("", lambda method: Field(DASH if method.rank is None else str(method.rank))),
        ("method", lambda method: Field(method.label)),
    ]
    for name, heading in {**_GAINS, PERPLEXITY: "text perplexity"}.items():
        columns.append((heading, _interval_of(name, 1.0)))
    columns.append(("joint questions", _interval_of(JOINT, 100.0)))
    for modality in methods[0].orders[0]:
        columns.append((words(modality), _interval_of(f"scores.{modality}", 100.0)))
    return columns


def _interval_of(name: str, factor: float) -> Callable[[ComparedMethod], Field]:
    return lambda method: _field(method.intervals.get(name), factor)


def _cost(value: float | None, name: str) -> Field:
    if value is None:
        return Field(DASH)
    short = name not in ("replay_rows", "training_seconds")
    return Field(_short(value) if short else f"{value:,.0f}")


def _field(interval: Interval | None, factor: float, sign: str = "") -> Field:
    if interval is None or interval.estimate is None:
        return Field(DASH)
    value = f"{factor * interval.estimate:{sign}.1f}"
    if interval.low is None or interval.high is None:
        return Field(value)
    low, high = factor * interval.low, factor * interval.high
    return Field(value, f"[{low:{sign}.1f}, {high:{sign}.1f}]")


def _difference(interval: Interval | None, factor: float) -> Field:
    field = _field(interval, factor, "+")
    if interval is None or interval.low is None or interval.high is None:
        return field
    return Field(field.value, field.spread, interval.low > 0.0 or interval.high < 0.0)


def _short(value: float) -> str:
    """A count with three digits and its thousand's letter: 134.5 M."""
    for size, letter in _UNITS:
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.0f}"


def _order(order: Iterable[str]) -> str:
    return ", ".join(words(name) for name in order)


def _markdown_table(headings: Sequence[str], rows: Sequence[Sequence[Field]]) -> list[str]:
    lines = ["| " + " | ".join(headings) + " |", "|" + " --- |" * len(headings)]
    for row in rows:
        texts = [f"**{field.value}** {field.spread}" if field.apart else field.text
                 for field in row]  # fmt: skip
        lines.append("| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |")
    return lines
