"""A finished run as a table on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from graftline.durable import atomic_write_text
from graftline.errors import GraftlineError
from graftline.evaluation.pictures import retention_against_storage
from graftline.evaluation.table import csv_table, label_of, markdown_table, summarise_runs
from tasks.outputs import matrix_rows, pictures, read_metrics


def summary_of(folders: Sequence[Path], out: Path | None = None) -> str:
    """Reports as a Markdown table: a row a method, with 95 % intervals over rows and seeds.

    Args:
        folders: the reports of finished runs.
        out: a folder that gets the table as Markdown and CSV, and the picture of retention
            against storage.
    """
    rows = summarise_runs(folders)
    text = markdown_table(rows)
    if out is not None:
        atomic_write_text(out / "table.md", text)
        atomic_write_text(out / "table.csv", csv_table(rows))
        points = [
            (label_of(row, rows[0].recipe), row.storage_bits, row.intervals["retention"])
            for row in rows
            if row.storage_bits is not None and "retention" in row.intervals
        ]
        title = f"{rows[0].recipe}: retention against storage"
        retention_against_storage(out / "storage.png", points, title)
    return text


def print_report(console: Console, folder: Path | str) -> None:
    """Prints scores over stages, the gains with their intervals, and where the pictures lie.

    Raises:
        GraftlineError: a file of the report is damaged; names it.
    """
    folder = Path(folder)
    metrics = read_metrics(folder)
    try:
        scores = _scores(folder, metrics)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise GraftlineError(
            f"{folder / 'scores.csv'}: is not readable ({error}); restore it, or run the recipe "
            "again with the folder moved away"
        ) from error
    console.print(scores)
    console.print(_gains(metrics))
    for path in [*pictures(folder), folder / "metrics.json"]:
        console.print(str(path), soft_wrap=True)


def _scores(folder: Path, metrics: dict[str, Any]) -> Table:
    title = f"{metrics['recipe']} · {metrics['method']} · seed {metrics['seed']}: scores x 100"
    table = Table(title=title, title_justify="left", min_width=len(title))
    table.add_column("")
    for modality in metrics["order"]:
        table.add_column(modality.replace("_", " "), justify="right")
    for label, scores in matrix_rows(folder):
        fields = [f"{100 * scores[m]:.1f}" if m in scores else "" for m in metrics["order"]]
        table.add_row(label, *fields)
    return table


def _gains(metrics: dict[str, Any]) -> Table:
    table = Table(title="gains in %", title_justify="left")
    for heading in ("", "value", "95 % interval"):
        table.add_column(heading, justify="right" if heading else "left")
    names = {"BRG": "brg", "FRG": "frg_mean", "retention": "retention"}
    for label, key in names.items():
        value = metrics.get(key)
        if value is None:
            table.add_row(label, "n/a", str(metrics.get("undefined", {}).get(key, "")))
            continue
        interval = metrics.get("intervals", {}).get(key)
        known = interval is not None and interval["low"] is not None
        text = f"{interval['low']:.2f} to {interval['high']:.2f}" if known else ""
        table.add_row(label, f"{value:.2f}", text)
    if metrics.get("joint") is not None:
        interval = metrics["intervals"]["joint"]
        text = f"{100 * interval['low']:.2f} to {100 * interval['high']:.2f}"
        table.add_row("joint questions", f"{100 * metrics['joint']:.2f}", text)
    before, after = metrics.get("text_perplexity_before"), metrics.get("text_perplexity_after")
    if before is not None and after is not None:
        table.add_row("text perplexity", f"{after:.2f}", f"before: {before:.2f}")
    return table
