"""The rows of a recipe's own sources, imported before a run is planned."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from filelock import FileLock
from prefect import task
from prefect.cache_policies import NO_CACHE

from graftline.data.build import listing_md5
from graftline.errors import GraftlineError
from graftline.recipe import Recipe
from graftline.steps.imports import OwnRows, files_of, hashes_of, known_rows, requests_of, rows_of
from graftline.stores import open_store
from tasks.data import bar, known_version
from tasks.references import DataVersion

_WARNINGS = 10
_log = logging.getLogger(__name__)


@task(name="import-data", cache_policy=NO_CACHE, persist_result=False)
def import_own_data(recipe: Recipe) -> dict[str, OwnRows]:
    """Imports what a recipe's sources hold and what is not in the store yet.

    Returns:
        modality -> its rows; empty where the recipe has no source of its own.

    Raises:
        GraftlineError: lists every problem by file and row, of all modalities.
    """
    requests = requests_of(recipe)
    if not requests:
        return {}
    store = open_store(recipe.store)
    hashes = hashes_of(store)
    found: dict[str, OwnRows] = {}
    problems: list[str] = []
    lock = store.root / ".locks" / "import.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        for name, request in requests.items():
            try:
                with bar() as progress:
                    found[name] = rows_of(request, store, hashes, progress)
                _warn(name, found[name].warnings)
            except GraftlineError as error:
                problems.append(str(error))
    if problems:
        raise GraftlineError("\n".join(problems))
    return found


def _warn(modality: str, warnings: Sequence[str]) -> None:
    for warning in warnings[:_WARNINGS]:
        _log.warning("%s: %s", modality, warning)
    if len(warnings) > _WARNINGS:
        _log.warning("%s: %d warnings more", modality, len(warnings) - _WARNINGS)


def in_folder(recipe: Recipe) -> dict[str, str]:
    """Modality -> what its rows hold, of those whose rows lie in the recipe's data folder."""
    return {
        name: recipe.kind_of(name) for name in recipe.order if recipe.modality(name).data is None
    }


def with_own(recipe: Recipe, folder: DataVersion | None, own: Mapping[str, OwnRows]) -> DataVersion:
    """The version of all data of a recipe: the folder's alone where there are no own sources."""
    if not own and folder is not None:
        return folder
    files = files_of(own)
    sums = {f"{name}/{split}": md5 for name, each in files.items() for split, md5 in each.items()}
    if folder is None:
        return DataVersion(recipe.name, listing_md5(sums), files, "modalities.*.data of the recipe")
    md5 = listing_md5({**sums, folder.folder: folder.md5})
    return DataVersion(folder.folder, md5, {**folder.files, **files}, folder.source)


def whole_data(recipe: Recipe) -> DataVersion | None:
    """The version of a recipe's data if every modality's is there; nothing is imported or built.

    Raises:
        GraftlineError: lists what is wrong with the recipe's own sources.
    """
    data, problems = known_data(recipe)
    if problems:
        raise GraftlineError("\n".join(problems))
    return data if data is not None and data.files.keys() >= set(recipe.order) else None


def known_data(recipe: Recipe) -> tuple[DataVersion | None, list[str]]:
    """The version of a recipe's data as far as it is there, and what is wrong with its sources.

    Nothing is imported, built or recorded. Modalities that are still to be imported are not among
    the version's files; it is None where nothing is known at all.
    """
    store = open_store(recipe.store, verify="quick")
    hashes, problems = hashes_of(store), []
    own: dict[str, OwnRows] = {}
    for name, request in requests_of(recipe).items():
        try:
            rows = known_rows(request, store, hashes)
        except GraftlineError as error:
            problems.append(f"modalities.{name}.data: {error}")
            continue
        if rows is not None:
            own[name] = rows
    folder = known_version(recipe.data.folder) if in_folder(recipe) else None
    if folder is None and not own:
        return None, problems
    return with_own(recipe, folder, own), problems
