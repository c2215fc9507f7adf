"""Encoding a modality's media: the step `features`, whole or in shares that go to several machines.

Rows of the data folder are published in the store for machines that have no such folder.
"""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from graftline.data.build import checksums
from graftline.data.dividing import every_share, only_share, share_name
from graftline.data.examples import ROWS
from graftline.data.features import compute_features
from graftline.data.kinds import FEATURES
from graftline.data.rows import SPLITS, split_file
from graftline.data.shares import share_of
from graftline.data.streaming import SplitRows
from graftline.encoders import open_encoder
from graftline.encoders.arrays import compute_array_features
from graftline.errors import GraftlineError
from graftline.model.clips import for_any_length
from graftline.model.opening import keep_convolutions_in_float32
from graftline.planning.plan import Step, rows_step
from graftline.progress import track
from graftline.steps.work import Machine, Work
from graftline.store import Artifact, Store
from graftline.team import current

BATCH, OWN_BATCH = 64, 16
"""Media that are decoded and encoded together; a user's own may be large."""


def features(work: Work) -> None:
    """Encodes a modality's three splits; what was encoded before is not encoded again."""
    encoder = _encoder(work)
    if work.machine.feature_shares == 1:
        _encode(work, encoder)
        return
    for _ in every_share(work.machine.feature_shares):
        _encode(work, encoder)


def encode_share(step: Step, store: Store, machine: Machine, number: int) -> None:
    """Encodes one of a step's `machine.feature_shares` shares, unless that is done.

    Args:
        step: of the kind `features`.
        store: where the share is kept until the step is published.
        machine: this one.
        number: which share, from 1.

    Raises:
        GraftlineError: a medium cannot be encoded; names file and row.
    """
    count, fingerprint = machine.feature_shares, step.reference.fingerprint
    if store.holds(step.kind, fingerprint):
        return
    parents = rows_of(step, store, machine)
    name = share_name(number, count)
    with store.share(step.kind, fingerprint, name) as to_do:
        if to_do:
            folder = store.work_folder(step.kind, fingerprint)
            with only_share(number, count):
                work = Work(step, parents, machine, folder, folder / "out")
                _encode(work, _encoder(work))


def publish_rows(step: Step, store: Store, machine: Machine) -> None:
    """Publishes the rows that a step encodes, for machines that do not have the data folder.

    Raises:
        GraftlineError: they changed since the run was planned.
    """
    rows = _rows_step(step)
    if "rows" in step.parents or store.holds(rows.kind, rows.reference.fingerprint):
        return
    modality = step.parameters["modality"]

    def build(out: Path) -> None:
        for split in SPLITS:
            source = split_file(machine.data_folder, modality, split)
            shutil.copyfile(source, out / f"{split}.parquet")
        if changed := _changed(step, out):
            _refuse(machine.data_folder, changed)

    rows.publish(store, build)


def rows_of(step: Step, store: Store, machine: Machine) -> dict[str, Artifact]:
    """The parent `rows` of a step in the store; none if this machine's data folder has them.

    Raises:
        GraftlineError: they are in neither.
    """
    folder = split_file(machine.data_folder, step.parameters["modality"], "train").parent
    imported = step.parents.get("rows")
    changed = [] if imported else _changed(step, folder)
    if not imported and not changed:
        return {}
    reference = imported or _rows_step(step).reference
    found = store.find(reference.kind, reference.fingerprint)
    if found is None and folder.is_dir() and not imported:
        _refuse(machine.data_folder, changed)
    if found is None:
        raise GraftlineError(
            f"{step.label}: its rows are neither in {machine.data_folder} on this machine nor in "
            "the store; run the recipe again where the data are"
        )
    return {"rows": found}


def _rows_step(step: Step) -> Step:
    return rows_step(step.parameters["modality"], step.parameters["files"])


def _encoder(work: Work) -> Any:
    described, device = work.step.parameters["encoder"], work.machine.torch_device
    keep_convolutions_in_float32()
    return for_any_length(open_encoder(described, device))


def _encode(work: Work, encoder: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    parameters = work.step.parameters
    modality = parameters["modality"]
    kind = parameters.get("media", modality)
    compute = compute_array_features if kind == FEATURES else compute_features
    folder = _rows_folder(work, modality)
    batch = OWN_BATCH if "rows" in work.step.parents else BATCH
    for split in SPLITS:
        _forget_cut_shares(work.folder / split)
        rows = SplitRows(folder / f"{split}.parquet", (parameters["rows"] or {}).get(split))
        own = len(share_of(len(rows), batch))
        with track(f"{modality}: features of {split}", own) as advance:
            compute(
                rows,
                kind,
                encoder,
                work.out / split,
                shares=work.folder / split,
                batch=batch,
                progress=partial(advance, ""),
            )
        if current().first:
            pq.write_table(pa.Table.from_pylist(rows.texts()), work.out / split / ROWS)


def _forget_cut_shares(folder: Path) -> None:
    """Drops the records of shares that hold less than they say: they are encoded from the start.

    Appending to such a share would fill the gap with zeros.
    """
    for record in folder.glob("share-*.json"):
        with suppress(OSError, ValueError, KeyError):  # what cannot be read counts as no record
            said = json.loads(record.read_text(encoding="utf-8"))
            size = 2 * said["rows"] * said["tokens"] * said["width"]
            values, names = record.with_suffix(".bin"), record.with_suffix(".ids")
            whole = values.is_file() and values.stat().st_size >= size
            if not (whole and names.is_file() and names.read_bytes().count(b"\n") >= said["rows"]):
                record.unlink()


def _rows_folder(work: Work, modality: str) -> Path:
    """Where a modality's splits lie: in the store, or in the data folder, as `rows_of` found."""
    if "rows" in work.parents:
        return work.parents["rows"].folder
    return split_file(work.machine.data_folder, modality, "train").parent


def _changed(step: Step, folder: Path) -> list[str]:
    """Files of a step's rows that are not in a folder as the plan knows them."""
    there = checksums(folder) if folder.is_dir() else {}
    modality, expected = step.parameters["modality"], step.parameters["files"]
    splits = [split for split, md5 in expected.items() if there.get(f"{split}.parquet") != md5]
    return [f"{modality}/{split}.parquet" for split in splits]


def _refuse(folder: Path, changed: list[str]) -> NoReturn:
    raise GraftlineError(
        f"{folder}: {', '.join(changed)} changed while the run was going on; run it again."
    )
