"""`graftline merge`: what the command line's words mean, and what it says afterwards."""

from __future__ import annotations

import filecmp
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from graftline import durable
from graftline.errors import GraftlineError
from graftline.exchange.adapter_folders import is_adapter, write_expert
from graftline.exchange.kinship import require_kin
from graftline.merging.checkpoints import open_checkpoint
from graftline.merging.companions import companions_of, read_record
from graftline.merging.elsewhere import fetch_checkpoint, is_elsewhere
from graftline.merging.streaming import MergeReport, MergeRequest, merge_checkpoints
from graftline.progress import shown
from graftline.settings.reading import parse_override
from graftline.weight_files import Entry, Origin


def merge(
    rule: str,
    base: str,
    experts: Sequence[str],
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
        base: the base: a folder, or `s3://bucket/prefix`.
        experts: the experts, given so: checkpoints, or adapters in PEFT's layout.
        out: folder to make.
        settings: `KEY=VALUE` of the rule's parameters.
        keep: `PREFIX` or `PREFIX=CHECKPOINT` of tensors that are not merged.
        seed: of random choices.
        shard_gigabytes: most bytes (10**9) in a file of the result.
        console: where bar and warnings go.

    Raises:
        GraftlineError: lists what stands against it.
    """
    if not math.isfinite(shard_gigabytes):
        raise GraftlineError(f"--shard-gigabytes {shard_gigabytes}: give a number, e.g. 5")
    kept = {prefix: source for prefix, _, source in (text.partition("=") for text in keep)}
    given = (base, *experts, *filter(None, kept.values()))
    with shown(console), _sources(given, out) as sources:
        folders = sources.experts(base, experts, tuple(kept))
        request = MergeRequest(
            rule=rule,
            base=sources.folders[base],
            experts=tuple(folders),
            out=out,
            parameters=dict(parse_override(text) for text in settings),
            keep={p: sources.folders[each] if each else None for p, each in kept.items()},
            seed=seed,
            shard_bytes=int(shard_gigabytes * 1e9),
            names={
                **{folder: name for name, folder in sources.folders.items()},
                **dict(zip(folders, experts, strict=True)),
            },
            origins=sources.origins,
        )
        report = merge_checkpoints(request)
        if report.reused:
            _require_intact(request)
    for warning in report.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False, highlight=False)
    return report


def _require_intact(request: MergeRequest) -> None:
    """Reads a finished merge before it is called finished: weights by sha256, what is copied whole.

    Raises:
        GraftlineError: names the files that are not what was merged.
    """
    record = read_record(request.out)
    assert record is not None  # by which it was found to be finished
    files: Mapping[str, Mapping[str, str]] = record["files"]
    changed = [
        name
        for name, each in files.items()
        if durable.file_sha256(request.out / name) != each["sha256"]
    ]
    for path in companions_of(request.base):
        copy = request.out / path.name
        if not copy.is_file() or not filecmp.cmp(path, copy, shallow=False):
            changed.append(path.name)
    if changed:
        raise GraftlineError(
            f"{request.out}: {', '.join(changed)} is not what was merged, or not what the base has "
            "now; choose another --out, or remove this folder and merge again"
        )


@dataclass(frozen=True)
class _Sources:
    """What is merged.

    Attributes:
        made: a folder for what is gone after the merge.
        folders: as given -> its folder on this machine, or one that stands for an object store's.
        origins: such a folder -> file name -> where the bytes are read.
    """

    made: Path
    folders: Mapping[str, Path]
    origins: Mapping[Path, Mapping[str, Origin]]

    def experts(self, base: str, experts: Sequence[str], kept: tuple[str, ...]) -> list[Path]:
        """The experts as checkpoints; of adapters, made ones that have them added to the base.

        Args:
            base: as given.
            experts: as given.
            kept: prefixes of what is not merged, and need not stem from the base.

        Raises:
            GraftlineError: an expert was not trained from this base; says what shows it.
        """
        theirs = self.folders[base]
        ours, found = self._merged(theirs, kept), []
        for number, given in enumerate(experts):
            folder = self.folders[given]
            if is_adapter(folder):
                expert, folder = folder, self.made / f"expert-{number}"
                write_expert(theirs, expert, folder)
            else:
                require_kin(ours, self._merged(folder, kept), (theirs, folder))
            found.append(folder)
        return found

    def _merged(self, folder: Path, kept: tuple[str, ...]) -> dict[str, Entry]:
        """The tensors of a checkpoint but for those whose names begin with a kept prefix."""
        entries = open_checkpoint(folder, self.origins.get(folder)).entries
        return {name: each for name, each in entries.items() if not name.startswith(kept)}


@contextmanager
def _sources(given: Sequence[str], out: Path) -> Iterator[_Sources]:
    """Folders of all that is given, the base first; what was fetched or made goes afterwards.

    Raises:
        GraftlineError: something is not there; what else is raised in the context speaks of what
            was given.
    """
    made = durable.temporary_sibling(out.absolute())
    folders = {each: Path(each) for each in given if not is_elsewhere(each)}
    fetched: dict[str, Path] = {}
    origins: dict[Path, Mapping[str, Origin]] = {}
    try:
        with durable.naming_disk_faults(made.parent):
            # The base comes last: adapters are added to one whose weights are here.
            for number, each in enumerate(reversed(dict.fromkeys(given))):
                if is_elsewhere(each):
                    fetched[each] = made / f"source-{number}"
                    whole = each == given[0] and any(
                        is_adapter(folder) for folder in (folders | fetched).values()
                    )
                    origins[fetched[each]] = fetch_checkpoint(each, fetched[each], whole=whole)
            yield _Sources(made, folders | fetched, origins)
    except GraftlineError as error:
        text = str(error)
        for name, folder in fetched.items():
            text = text.replace(str(folder), name)
        raise GraftlineError(text) if text != str(error) else error from None
    finally:
        durable.remove(made)


def summary(report: MergeReport) -> str:
    """One line about what a merge left behind."""
    if report.reused:
        return f"{report.folder} holds this merge already"
    return f"{report.folder}: {report.merged} tensors merged, {report.kept} kept unchanged"
