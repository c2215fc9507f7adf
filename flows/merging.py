"""`graftline merge`: what the command line's words mean, and what it says afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from graftline import durable
from graftline.adapter_folders import is_adapter, write_expert
from graftline.kinship import require_kin
from graftline.merging.checkpoints import open_checkpoint
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
        experts: folders of the experts: checkpoints, or adapters in PEFT's layout.
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
    with shown(console), _checkpoints(base, experts, out) as folders:
        request = MergeRequest(
            rule=rule,
            base=base,
            experts=tuple(folders),
            out=out,
            parameters=dict(parse_override(text) for text in settings),
            keep={prefix: Path(folder) if folder else None for prefix, _, folder in kept},
            seed=seed,
            shard_bytes=int(shard_gigabytes * 1e9),
            names={folder: str(given) for folder, given in zip(folders, experts, strict=True)},
        )
        report = merge_checkpoints(request)
    for warning in report.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False, highlight=False)
    return report


@contextmanager
def _checkpoints(base: Path, experts: Sequence[Path], out: Path) -> Iterator[list[Path]]:
    """The experts as checkpoints; adapters are added to the base in a folder that goes afterwards.

    Raises:
        GraftlineError: an expert was not trained from this base; says what shows it.
    """
    ours = open_checkpoint(base)
    for expert in experts:
        if not is_adapter(expert):
            require_kin(ours.entries, open_checkpoint(expert).entries, (base, expert))
    temporary = durable.temporary_sibling(out.absolute())
    folders = [
        temporary / str(number) if is_adapter(expert) else expert
        for number, expert in enumerate(experts)
    ]
    try:
        with durable.naming_disk_faults(temporary.parent):
            for folder, expert in zip(folders, experts, strict=True):
                if folder != expert:
                    write_expert(base, expert, folder)
        yield folders
    finally:
        durable.remove(temporary)


def summary(report: MergeReport) -> str:
    """One line about what a merge left behind."""
    if report.reused:
        return f"{report.folder} holds this merge already"
    return f"{report.folder}: {report.merged} tensors merged, {report.kept} kept unchanged"
