"""The data's version: build what is missing, check it, and let DVC record it."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock
from prefect import task
from prefect.cache_policies import NO_CACHE

from graftline.data import build as building
from graftline.data.kinds import kinds_of
from graftline.data.parts import Progress
from graftline.data.rows import MODALITIES
from graftline.data.validation import require_valid
from graftline.errors import GraftlineError
from graftline.progress import Advance, track
from graftline.recipe import DataSettings
from graftline.stores import machine_folder
from tasks.references import DataVersion

_log = logging.getLogger(__name__)


def inside_dvc() -> bool:
    """Whether this process runs under `dvc repro`, which holds DVC's lock."""
    return any(os.environ.get(name) for name in ("DVC_STAGE", "DVC_ROOT", "DVC_REPRO"))


def pointer(folder: Path) -> Path:
    """The `.dvc` file of a data folder, which lies beside it.

    Raises:
        GraftlineError: there is no beside.
    """
    named = _named(folder)
    return named.with_name(f"{named.name}.dvc")


def _named(folder: Path) -> Path:
    """A folder by a path that ends in its name, as `.` does not."""
    named = Path(os.path.abspath(folder)) if folder.name in ("", "..") else folder
    if not named.name:
        raise GraftlineError(
            f"{folder}: is the whole disk, not a folder of data; name another one with data.folder "
            "(--folder)"
        )
    return named


def why_not_built(folder: str, modalities: Iterable[str]) -> str | None:
    """Why a data folder that is missing is not made by itself, and what to do.

    Who names a folder, or has modalities that the starter does not have, wants rows of their own:
    the starter's would be trained on in their place.

    Args:
        folder: the data folder.
        modalities: whose rows are to lie in it.

    Returns:
        None where it is there, or the starter's data are made there.
    """
    place, own = Path(folder), [name for name in modalities if name not in MODALITIES]
    usual = os.path.abspath(folder) == os.path.abspath(DataSettings().folder)
    if is_filled(place) or (usual and not own):
        return None
    problem = f"data.folder: {folder}: "
    problem += "is empty" if place.is_dir() else "there is no such folder"
    if own:
        problem += (
            f", and the starter has no rows of {', '.join(own)}; put rows there as "
            "<name>/<split>.parquet, or say where they are with modalities.<name>.data"
        )
    else:
        problem += f"; `graftline data build --folder {folder}` makes the starter's"
    source = pointer(place)
    return problem + (f"; `dvc pull {source}` fetches what it records" if source.exists() else "")


def is_filled(folder: Path) -> bool:
    """Whether a folder is there and holds anything."""
    return folder.is_dir() and any(folder.iterdir())


@task(name="build-data", cache_policy=NO_CACHE, persist_result=False)
def build_data(folder: str, store: str, modalities: Iterable[str] = MODALITIES) -> None:
    """Builds the starter's data if the folder is missing.

    Args:
        folder: the data folder.
        store: the artifact store.
        modalities: whose rows are to lie in it.

    Raises:
        GraftlineError: it is missing under `dvc repro`, where DVC provides the data, or it is not
            the starter's place.
    """
    target = _named(Path(folder))
    with _one_at_a_time(store):
        if is_filled(target):
            return
        if problem := why_not_built(folder, modalities):
            raise GraftlineError(problem)
        if inside_dvc():
            raise GraftlineError(
                f"{folder} is missing; run `dvc pull`, or `graftline data build` once, before "
                "`dvc repro`"
            )
        with bar() as progress:
            building.build(target, progress=progress)


@task(name="validate-data", cache_policy=NO_CACHE, persist_result=False)
def validate_data(folder: str, store: str, modalities: Mapping[str, str] | None = None) -> None:
    """Checks every row of a data folder, once for each version of it.

    Args:
        folder: the data folder.
        store: the artifact store, which remembers what was checked.
        modalities: which to look at, with what their rows hold; the starter's if left out.

    Raises:
        GraftlineError: lists every problem by file and row.
    """
    wanted = kinds_of(modalities or MODALITIES)
    md5 = building.directory_md5(Path(folder))
    named = "".join(f" {name}={kind}" for name, kind in sorted(wanted.items()))
    mark = (
        machine_folder(store)
        / ".validated"
        / (md5 if wanted == kinds_of(MODALITIES) else md5 + named)
    )
    if mark.exists():
        return
    with bar() as progress:
        require_valid(Path(folder), wanted, progress=progress)
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()


@task(name="record-data-version", cache_policy=NO_CACHE, persist_result=False)
def record_version(folder: str, store: str) -> DataVersion:
    """Lets DVC record the folder's version, unless it is recorded already or DVC is at work."""
    target = _named(Path(folder))
    source = pointer(target)
    sums = building.checksums(target)
    md5 = building.listing_md5(sums)
    with _one_at_a_time(store):
        known = source.exists() and building.recorded(source)[0] == md5
        if not known and not inside_dvc() and _is_dvc_project(target):
            if source.exists():
                _log.warning("%s differs from %s: recorded as a new version", folder, source.name)
            _dvc_add(target)
            building.record_files(target, source)
            known = True
    files = building.by_modality(sums)
    return DataVersion(folder, md5, files, str(source) if known else folder)


def known_version(folder: str) -> DataVersion | None:
    """The version of a data folder, found without building, checking or recording anything.

    Returns:
        What the folder holds; where it is missing, what its `.dvc` file records, file by file;
        None where neither is there.

    Raises:
        GraftlineError: the `.dvc` file is damaged.
    """
    target, source = Path(folder), pointer(Path(folder))
    if is_filled(target):
        sums = building.checksums(target)
        return DataVersion(folder, building.listing_md5(sums), building.by_modality(sums), folder)
    if source.exists():
        md5, sums = building.recorded(source)
        if sums:
            return DataVersion(folder, md5, building.by_modality(sums), str(source))
    return None


@contextmanager
def bar() -> Iterator[Progress]:
    """A callback `(what, done, total)` that moves one progress bar."""
    with ExitStack() as stack:
        bars: list[Advance] = []
        moved = 0

        def update(what: str, done: int, total: int) -> None:
            nonlocal moved
            if not bars:
                bars.append(stack.enter_context(track(f"{what.split()[0]} data", total)))
            bars[0](what, max(0, done - moved))
            moved = max(done, moved)

        yield update


def _one_at_a_time(store: str) -> FileLock:
    folder = machine_folder(store) / ".locks"
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / "data.lock")


def _is_dvc_project(folder: Path) -> bool:
    return (folder.absolute().parent / ".dvc").is_dir()


def _dvc_add(folder: Path) -> None:
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "add", "--quiet", folder.name],
        cwd=folder.absolute().parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise GraftlineError(
            f"`dvc add {folder.name}` failed: {(done.stderr or done.stdout).strip()[-800:]}"
        )
