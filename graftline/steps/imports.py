"""Own data in the artifact store: imported once, known by their content, found again.

Rows are published as `rows/<fingerprint>`, whose fingerprint comes from the rows alone: the same
rows from another place are the same artifact. `.imports/<identity>.json` remembers which source
gave which rows.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from graftline.data.build import checksums
from graftline.data.files import FileHashes
from graftline.data.rows import SPLITS
from graftline.data.sources.importing import (
    Imported,
    Progress,
    Request,
    identity_of,
    import_rows,
)
from graftline.durable import atomic_write_text, building, sweep_siblings
from graftline.errors import GraftlineError
from graftline.planning.plan import Step, rows_step
from graftline.recipe import Recipe
from graftline.store import Store

FOLDER, MEMORY = ".imports", "files.parquet"
_LONGEST_LIST = 50


@dataclass(frozen=True)
class OwnRows:
    """Imported rows.

    Attributes:
        files: split -> md5 of its parquet file.
        counts: split -> task -> rows.
        warnings: what the import found that does not stand in the way.
    """

    files: dict[str, str]
    counts: dict[str, dict[str, int]]
    warnings: list[str]

    def step(self, modality: str) -> Step:
        """The step that a plan has for them."""
        return rows_step(modality, self.files)


def requests_of(recipe: Recipe) -> dict[str, Request]:
    """What a recipe's order needs imported, by modality."""
    found = {}
    for name in recipe.order:
        settings = recipe.modality(name).data
        if settings is not None:
            found[name] = Request(name, recipe.kind_of(name), settings)
    return found


def hashes_of(store: Store) -> FileHashes:
    """The hashes of media that a store remembers."""
    return FileHashes(store.root / FOLDER / MEMORY)


def known_rows(request: Request, store: Store, hashes: FileHashes) -> OwnRows | None:
    """Rows that were imported from just this source; None where that is still to be done.

    Raises:
        GraftlineError: the source cannot be read.
        CorruptArtifact: the rows are damaged.
    """
    file = _record(store, identity_of(request, hashes))
    try:
        found = OwnRows(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    reference = found.step(request.modality).reference
    return found if store.find(reference.kind, reference.fingerprint) is not None else None


def rows_of(
    request: Request,
    store: Store,
    hashes: FileHashes,
    progress: Progress | None = None,
    look: Callable[[Path, Imported], None] | None = None,
) -> OwnRows:
    """Rows of a source, imported if they are not there yet.

    Args:
        request: what is wanted.
        store: where artifacts lie.
        hashes: of files.
        progress: called after each row that is read.
        look: called with the folder of the rows and what was found, before problems are raised.

    Raises:
        GraftlineError: lists every problem by file and row.
        StoreUnwritable: the disk is full, or the store read-only.
    """
    if look is None:
        known = known_rows(request, store, hashes)
        if known is not None:
            return known
    work = store.root / FOLDER / "rows"
    sweep_siblings(work)
    with building(work) as folder:
        found = import_rows(request, folder, hashes, progress)
        return _looked_at(request, store, folder, found, look)


def _looked_at(
    request: Request,
    store: Store,
    folder: Path,
    found: Imported,
    look: Callable[[Path, Imported], None] | None,
) -> OwnRows:
    """Publishes what was imported, unless something is wrong with it."""
    if look is not None:
        look(folder, found)
    if found.problems:
        raise GraftlineError(problem_list(request.modality, found.problems))
    return _publish(request, store, folder, found)


def problem_list(modality: str, problems: tuple[str, ...]) -> str:
    """What is wrong with a modality's rows, the first of it."""
    lines = list(problems[:_LONGEST_LIST])
    if len(problems) > _LONGEST_LIST:
        lines.append(f"... and {len(problems) - _LONGEST_LIST} more")
    return (
        f"{modality}: its data have {len(problems)} problem(s); mend these rows, or go on without "
        f"them by `modalities.{modality}.data.bad_rows: skip` (a medium in two splits is never "
        "skipped):\n  " + "\n  ".join(lines)
    )


def _publish(request: Request, store: Store, folder: Path, found: Imported) -> OwnRows:
    files = {name.removesuffix(".parquet"): md5 for name, md5 in checksums(folder).items()}
    rows = OwnRows({split: files[split] for split in SPLITS}, found.counts, list(found.warnings))
    step = rows.step(request.modality)

    def build(out: Path) -> None:
        for split in SPLITS:
            shutil.move(folder / f"{split}.parquet", out / f"{split}.parquet")

    step.publish(store, build)
    atomic_write_text(_record(store, found.identity), json.dumps(asdict(rows), ensure_ascii=False))
    return rows


def _record(store: Store, identity: str) -> Path:
    return store.root / FOLDER / f"{identity}.json"


def files_of(rows: Mapping[str, OwnRows]) -> dict[str, dict[str, str]]:
    """Modality -> split -> md5, as a plan wants it."""
    return {name: dict(own.files) for name, own in rows.items()}
