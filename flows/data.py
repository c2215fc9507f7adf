"""The flow that versions the data: build what is missing, check every row, record the version."""

from __future__ import annotations

from prefect import flow

from tasks.data import build_data, record_version, validate_data
from tasks.references import DataVersion


@flow(name="version-data", persist_result=False, validate_parameters=False)
def version_data(folder: str = "data", store: str = "artifacts") -> DataVersion:
    """Makes sure that the data are there, valid and recorded.

    Args:
        folder: the data folder.
        store: the artifact store, which remembers what was checked.

    Returns:
        The version: md5 of the folder and of each file.
    """
    build_data(folder, store)
    validate_data(folder, store)
    return record_version(folder, store)
