"""The flow that versions the data: build what is missing, check every row, record the version."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prefect import flow

from graftline.data.rows import MODALITIES
from graftline.planning.problems import files_to_come, require_possible
from graftline.recipe import Recipe
from tasks.data import build_data, record_version, validate_data
from tasks.own_data import import_own_data, in_folder, with_own
from tasks.references import DataVersion


@flow(name="version-data", persist_result=False, validate_parameters=False)
def version_data(
    folder: str = "data", store: str = "artifacts", modalities: Mapping[str, str] | None = None
) -> DataVersion:
    """Makes sure that the data are there, valid and recorded.

    Args:
        folder: the data folder.
        store: the artifact store, which remembers what was checked.
        modalities: which are used, with what their rows hold; the starter's if left out.

    Returns:
        The version: md5 of the folder and of each file.
    """
    build_data(folder, store, modalities or MODALITIES)
    validate_data(folder, store, modalities)
    return record_version(folder, store)


def versioned(recipe: Recipe, runs: Sequence[Recipe] = ()) -> DataVersion:
    """The data of a recipe: own sources imported, the data folder versioned where it is used.

    Args:
        recipe: the recipe.
        runs: what is run on them; what stands against one of these is told before data are built.

    Raises:
        GraftlineError: lists every problem by key, or by file and row.
    """
    for run in runs:
        require_possible(run, files_to_come(run))
    own = import_own_data(recipe)
    folder = in_folder(recipe)
    found = version_data(recipe.data.folder, recipe.store, folder) if folder else None
    return with_own(recipe, found, own)
