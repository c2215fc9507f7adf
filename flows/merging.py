"""`graftline merge`: what the command line's words mean, and what it says afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from graftline.merging.streaming import MergeReport, MergeRequest, merge_checkpoints
from graftline.progress import shown
from graftline.recipe import parse_override


def merge(
    rule: str,
    base: Path,
    experts: Sequence[Path],
    out: Path,
    *,
    settings: Sequence[str],
    keep: Sequence[str],
    seed: int,
    shard_gigabytes: float,
    console: Console,
) -> MergeReport:
    """Merges checkpoints with a progress bar; warnings go to the console.

    Args:
        rule: name of the merge rule.
        base: folder of the base.
        experts: folders of the experts.
        out: folder to make.
        settings: `KEY=VALUE` of the rule's parameters.
        keep: `PREFIX` or `PREFIX=FOLDER` of tensors that are not merged.
        seed: of random choices.
        shard_gigabytes: most bytes (10**9) in a file of the result.
        console: where bar and warnings go.

    Raises:
        GraftlineError: lists what stands against it.
    """
    kept = [text.partition("=") for text in keep]
    request = MergeRequest(
        rule=rule,
        base=base,
        experts=tuple(experts),
        out=out,
        parameters=dict(parse_override(text) for text in settings),
        keep={prefix: Path(folder) if folder else None for prefix, _, folder in kept},
        seed=seed,
        shard_bytes=int(shard_gigabytes * 1e9),
    )
    with shown(console):
        report = merge_checkpoints(request)
    for warning in report.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False, highlight=False)
    return report


def summary(report: MergeReport) -> str:
    """One line about what a merge left behind."""
    if report.reused:
        return f"{report.folder} holds this merge already"
    return f"{report.folder}: {report.merged} tensors merged, {report.kept} kept unchanged"
