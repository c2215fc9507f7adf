"""Build the starter's data in one go, and tell whether a data folder is the recorded one."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pyarrow.parquet as pq
import yaml

from graftline import durable
from graftline.data import images, point_clouds, sounds, videos
from graftline.data.parts import Progress
from graftline.data.rows import MODALITIES, SPLITS, Row, as_columns, schema, split_file
from graftline.errors import GraftlineError

DEFAULT_SIZES = {"train": 3200, "validation": 240, "test": 400}
DEFAULT_SEED = 1
Generate = Callable[[Mapping[str, int], int], dict[str, list[Row]]]
GENERATORS: dict[str, Generate] = {
    "image": images.generate,
    "audio": sounds.generate,
    "video": videos.generate,
    "point_cloud": point_clouds.generate,
}
STARTERS_FILES = frozenset(
    split_file(Path(), modality, split).as_posix() for modality in MODALITIES for split in SPLITS
)
"""All that a build writes, by the path in its folder."""
_ROWS_A_GROUP = 400
_LISTED = 5


def build(
    folder: Path,
    sizes: Mapping[str, int] | None = None,
    seed: int = DEFAULT_SEED,
    progress: Progress | None = None,
) -> None:
    """Build the data of all modalities; the folder appears complete or not at all.

    Args:
        folder: Where the data go; the starter's data that were there are replaced.
        sizes: Rows of each split, the same for each modality; `DEFAULT_SIZES` when None.
        seed: Seed of all random choices; the same seed gives the same bytes.
        progress: Called before each modality and at the end.

    Raises:
        GraftlineError: A part is missing or damaged, a size is wrong, something lies in the
            folder that is not the starter's, or the disk refuses.
    """
    wanted = DEFAULT_SIZES if sizes is None else sizes
    target = folder.absolute()
    require_replaceable(target)
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        durable.sweep_siblings(target)
        temporary = durable.temporary_sibling(target)
        for done, (modality, generate) in enumerate(GENERATORS.items()):
            if progress is not None:
                progress(f"build {modality}", done, len(GENERATORS))
            for split, rows in generate(wanted, seed).items():
                _write(rows, split_file(temporary, modality, split))
        durable.fsync_tree(temporary)
        _swap(temporary, target)
    except OSError as error:
        raise GraftlineError(
            f"cannot write the data to {folder}: {error}. Free some space, or choose a folder "
            "that you may write to; nothing was changed."
        ) from error
    finally:
        if temporary is not None:
            durable.remove(temporary)
    if progress is not None:
        progress("build", len(GENERATORS), len(GENERATORS))


def _write(rows: list[Row], path: Path) -> None:
    """Write rows as parquet whose bytes depend on the rows alone.

    `Dataset.to_parquet` fixes its compression; the table of the `Dataset` is written instead,
    with the features that `datasets` reads back in its metadata.
    """
    from datasets import (
        Dataset,
        Features,
    )  # takes a second, and most who count checksums write none

    features = Features.from_arrow_schema(schema())
    dataset = Dataset.from_dict(as_columns(rows), features=features)
    table = dataset.data.table.cast(features.arrow_schema)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        pq.write_table(
            table,
            stream,
            row_group_size=_ROWS_A_GROUP,
            compression="zstd",
            compression_level=3,
            use_dictionary=["task", "question"],
        )


def require_replaceable(folder: Path) -> None:
    """Stop before a build would delete what somebody else put into its place.

    Raises:
        GraftlineError: A file lies in the folder's place, or the folder holds more than the
            starter's files.
    """
    if folder.exists() and not folder.is_dir():
        raise GraftlineError(f"{folder} is a file, not a folder of data; name a folder")
    others = _others(folder) if folder.is_dir() else []
    if others:
        more = f" and {len(others) - _LISTED} more" if len(others) > _LISTED else ""
        raise GraftlineError(
            f"{folder}: holds {', '.join(others[:_LISTED])}{more}, which the starter does not have "
            "and a build would delete; move it away, or build into another folder with "
            "`graftline data build --folder`"
        )


def _others(folder: Path) -> list[str]:
    """What lies in a folder and is no file of the starter's."""
    found = []
    for path in sorted(folder.iterdir()):
        if path.name in MODALITIES and path.is_dir() and not path.is_symlink():
            inside = {f"{path.name}/{each.name}": each for each in sorted(path.iterdir())}
            found += [n for n, each in inside.items() if n not in STARTERS_FILES or each.is_dir()]
        else:
            found.append(path.name)
    return found


def _swap(temporary: Path, target: Path) -> None:
    """Put a finished folder in the place of another one; restore the old one on failure."""
    if not target.exists():
        os.replace(temporary, target)
        return
    if not os.access(target, os.W_OK):  # it could be moved, and not be removed
        raise PermissionError(errno.EACCES, "read-only", str(target))
    old = durable.temporary_sibling(target)
    os.replace(target, old)
    try:
        os.replace(temporary, target)
    except OSError:
        os.replace(old, target)
        raise
    finally:
        durable.remove(old)


def checksums(folder: Path) -> dict[str, str]:
    """Return the md5 of each file of a folder by its relative path, as DVC counts them.

    Raises:
        GraftlineError: The folder does not exist.
    """
    if not folder.is_dir():
        raise GraftlineError(
            f"{folder} is missing; run `graftline data build --folder {folder}` to make it"
        )
    sums = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False))
        sums[path.relative_to(folder).as_posix()] = digest.hexdigest()
    return sums


def directory_md5(folder: Path) -> str:
    """Return the md5 of a folder exactly as DVC 3 writes it in a `.dvc` file, with `.dir`.

    Raises:
        GraftlineError: The folder does not exist.
    """
    return listing_md5(checksums(folder))


def listing_md5(sums: Mapping[str, str]) -> str:
    """Return the md5 that DVC 3 gives a folder of files (path to md5), with `.dir`.

    DVC hashes the JSON list of its files, sorted by their path as a string.
    """
    listing = json.dumps([{"md5": sums[name], "relpath": name} for name in sorted(sums)])
    return hashlib.md5(listing.encode(), usedforsecurity=False).hexdigest() + ".dir"


def record_files(folder: Path, data_dvc: Path) -> str:
    """Write the md5 of each file into `meta: files` of what `dvc add` wrote.

    Args:
        folder: The data folder.
        data_dvc: The `.dvc` file of this folder; `dvc` keeps its `meta`.

    Returns:
        md5 of the folder, with `.dir`.

    Raises:
        GraftlineError: `data.dvc` cannot be read or written, or belongs to other data.
    """
    expected, _ = recorded(data_dvc)
    sums = checksums(folder)
    if listing_md5(sums) != expected:
        raise GraftlineError(
            f"{data_dvc} records {expected}, but {folder} has {listing_md5(sums)}; run "
            f"`dvc add {folder.name}` first"
        )
    content = yaml.safe_load(data_dvc.read_text(encoding="utf-8"))
    content["meta"] = {**(content.get("meta") or {}), "files": sums}
    try:
        durable.atomic_write_text(data_dvc, yaml.safe_dump(content, sort_keys=False))
    except (OSError, durable.StoreUnwritable) as error:
        reason = error.__cause__ or error
        raise GraftlineError(f"cannot write {data_dvc}: {reason}; make it writable") from error
    return expected


def recorded(data_dvc: Path) -> tuple[str, dict[str, str]]:
    """Read `data.dvc`: the md5 of the folder, and of each file from `meta: files`.

    Returns:
        md5 of the folder (with `.dir`), and md5 by relative path (empty when not recorded).

    Raises:
        GraftlineError: The file is missing or is not a `.dvc` file.
    """
    try:
        content = yaml.safe_load(data_dvc.read_text(encoding="utf-8"))
        md5 = str(content["outs"][0]["md5"])
        files = (content.get("meta") or {}).get("files") or {}
        return md5, {str(name): str(value) for name, value in files.items()}
    except (OSError, UnicodeDecodeError) as error:
        raise GraftlineError(f"cannot read {data_dvc}: {error}; make it with `dvc add`") from error
    except (yaml.YAMLError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise GraftlineError(
            f"{data_dvc} is not what `dvc add` writes ({error!r}); restore it from git"
        ) from error


def verify(folder: Path, data_dvc: Path) -> list[str]:
    """Compare a data folder with `data.dvc`.

    Args:
        folder: The data folder.
        data_dvc: What `dvc add` wrote, with `meta: files` added by the data flow.

    Returns:
        One line for each file that is missing, differs or is too much; empty when all is well.

    Raises:
        GraftlineError: The folder is missing, or `data.dvc` cannot be read.
    """
    expected_md5, expected = recorded(data_dvc)
    found = checksums(folder)
    md5 = listing_md5(found)
    if md5 == expected_md5:
        return []
    if not expected or listing_md5(expected) != expected_md5:
        return [
            f"{folder}: differs as a whole (md5 {md5}, recorded {expected_md5}); which files "
            f"differ is not known, because {data_dvc.name} does not list the files of that version"
        ]
    lines = []
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            lines.append(f"{folder / name}: missing")
        elif name not in expected:
            lines.append(f"{folder / name}: too much, {data_dvc.name} does not record it")
        elif found[name] != expected[name]:
            lines.append(f"{folder / name}: differs (md5 {found[name]}, recorded {expected[name]})")
    return lines


def by_modality(sums: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Checksums by path as modality -> split -> md5; other files are left out."""
    found: dict[str, dict[str, str]] = {}
    for name, md5 in sums.items():
        modality, _, file = name.partition("/")
        if file.endswith(".parquet") and "/" not in file:
            found.setdefault(modality, {})[file.removesuffix(".parquet")] = md5
    return found
