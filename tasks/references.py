"""What flows and tasks hand to each other: names of things, never the things."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it loads torch, which takes seconds
    from graftline.steps.work import Machine


@dataclass(frozen=True)
class DataVersion:
    """One version of the data folder.

    Attributes:
        folder: the folder.
        md5: as `data.dvc` records it, with `.dir`.
        files: modality -> split -> md5 of its parquet file.
        source: where the version is recorded: `data.dvc`, or the folder itself.
    """

    folder: str
    md5: str
    files: Mapping[str, Mapping[str, str]]
    source: str


@dataclass(frozen=True)
class TrackedRun:
    """A run in MLflow.

    Attributes:
        uri: of the tracking server.
        experiment_id: the experiment.
        run_id: the parent run; stages are its children.
    """

    uri: str
    experiment_id: str
    run_id: str


@dataclass(frozen=True)
class Place:
    """Where steps find their inputs and leave their results.

    Attributes:
        store: folder of the artifact store.
        machine: what computes them, with the data.
        tracked: the run that numbers go to; None where nothing is recorded.
    """

    store: str
    machine: Machine
    tracked: TrackedRun | None = None
