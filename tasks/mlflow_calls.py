"""What is told to MLflow: operations over plain data, each of which can be repeated.

So a call can wait on disk while the server is away (`tasks.journal`), and may be told twice:
MLflow keeps one of two equal metrics, parameters or tags, and what is made is looked for first.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    LifecycleStage,
    LoggedModelStatus,
    Metric,
    Param,
    RunTag,
)
from mlflow.exceptions import MlflowException, RestException
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_PARENT_RUN_ID

from tasks.journal import Away, Refused

ENTRY = "graftline.entry"
"""The tag by which a run that a server made, and could not say so, is found again."""
_BATCH = 1000
_SERVER_FAULTS = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED")


def perform(client: MlflowClient, operation: str, arguments: Mapping[str, Any]) -> str | None:
    """Carries out an operation of a server.

    A refusal is believed the second time: runs that start at once may each look for the data's
    record (or the experiment), find none and make it, and who lost that race finds it now.

    Returns:
        The id of what it made, if it made something.

    Raises:
        Away: the server does not answer.
        Refused: it does not accept the call.
    """
    try:
        return _perform_once(client, operation, arguments)
    except Refused:
        return _perform_once(client, operation, arguments)


def _perform_once(client: MlflowClient, operation: str, arguments: Mapping[str, Any]) -> str | None:
    try:
        return OPERATIONS[operation](client, **arguments)
    except RestException as error:
        if error.error_code in _SERVER_FAULTS:
            raise Away(error.error_code) from error
        raise Refused(str(error)) from error
    except (MlflowException, ConnectionError) as error:
        raise Away(type(error.__cause__ or error).__name__) from error
    except FileNotFoundError as error:  # a report that is gone when it could be delivered
        raise Refused(str(error)) from error


def create_experiment(client: MlflowClient, name: str, location: str | None) -> str:
    """Returns the id of an experiment, made if absent, and restored if it was deleted."""
    found = client.get_experiment_by_name(name)
    if found is not None:
        if found.lifecycle_stage != LifecycleStage.ACTIVE:
            client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)
    return str(client.create_experiment(name, artifact_location=location))


def create_run(
    client: MlflowClient, experiment_id: str, tags: Mapping[str, str], start_time: int
) -> str:
    """Returns the id of a run, made if none has its `ENTRY` tag."""
    if ENTRY in tags:
        found = client.search_runs([experiment_id], f"tags.`{ENTRY}` = '{tags[ENTRY]}'")
        if found:
            return str(found[0].info.run_id)
    run = client.create_run(experiment_id, start_time=start_time, tags=dict(tags))
    return str(run.info.run_id)


def log(
    client: MlflowClient,
    run_id: str,
    metrics: Sequence[Sequence[Any]] = (),
    params: Mapping[str, str] | None = None,
    tags: Mapping[str, str] | None = None,
) -> None:
    """Records metrics (name, value, milliseconds since the epoch, step), parameters and tags."""
    numbers = [Metric(*metric) for metric in metrics]
    words = [Param(key, value[:6000]) for key, value in (params or {}).items()]
    marks = [RunTag(key, value) for key, value in (tags or {}).items()]
    if words or marks:
        client.log_batch(run_id, params=words, tags=marks)
    for start in range(0, len(numbers), _BATCH):
        client.log_batch(run_id, metrics=numbers[start : start + _BATCH])


def log_data(
    client: MlflowClient, run_id: str, name: str, digest: str, source: str, profile: str
) -> None:
    """Records the data's version as an input of a run."""
    dataset = Dataset(
        name=name,
        digest=digest,
        source_type="dvc",
        source=json.dumps({"uri": source}),
        profile=profile,
    )
    tags = [InputTag(MLFLOW_DATASET_CONTEXT, "training")]
    client.log_inputs(run_id, datasets=[DatasetInput(dataset, tags)])


def end_run(client: MlflowClient, run_id: str, status: str, end_time: int) -> None:
    """Ends a run and those of its children that are still running."""
    parent = client.get_run(run_id)
    query = f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{run_id}' and attributes.status = 'RUNNING'"
    for child in client.search_runs([parent.info.experiment_id], query):
        client.set_terminated(child.info.run_id, status, end_time)
    if parent.info.status == "RUNNING":
        client.set_terminated(run_id, status, end_time)


def log_model(
    client: MlflowClient,
    experiment_id: str,
    run_id: str,
    name: str,
    tags: Mapping[str, str],
    numbers: Mapping[str, float],
    step: int,
    now: int,
    links: Mapping[str, Any] | None = None,
    parent_run: str = "",
) -> str:
    """Records a checkpoint as a model that lies elsewhere, and its numbers; returns its id.

    With links to its parts it is one that MLflow loads and serves.
    """
    found = client.search_logged_models([experiment_id], f"source_run_id = '{run_id}'")
    model = next((each for each in found if each.name == name), None)
    if model is None:
        make = mlflow.create_external_model if links is None else mlflow.initialize_logged_model
        model = make(
            name=name,
            source_run_id=run_id,
            tags=dict(tags),
            experiment_id=experiment_id,
            model_type="multimodal",
        )
    model_id = str(model.model_id)
    if links is not None and model.status != LoggedModelStatus.READY:
        from tasks.serving import log_served  # takes seconds to import, and only here

        notes = {**tags, "run_id": parent_run, "stage_run_id": run_id}
        log_served(client, links, run_id, model_id, notes)
    for key, value in numbers.items():
        client.log_metric(run_id, key, value, now, step, model_id=model_id)
    return model_id


def register(
    client: MlflowClient, name: str, model_id: str, run_id: str, alias: str, tags: Mapping[str, str]
) -> str:
    """Registers a model, unless one of its fingerprint is, and points an alias at its version."""
    with suppress(MlflowException):
        client.create_registered_model(name)
    same = client.search_model_versions(f"name = '{name}'")
    version = next(
        (
            found.version
            for found in same
            if all(found.tags.get(key) == tags[key] for key in ("method", "fingerprint"))
        ),
        None,
    )
    if version is None:
        version = client.create_model_version(
            name, source=f"models:/{model_id}", run_id=run_id, tags=dict(tags), model_id=model_id
        ).version
    client.set_registered_model_alias(name, alias, str(version))
    return str(version)


def log_files(client: MlflowClient, run_id: str, paths: Sequence[str]) -> None:
    """Copies small files (report and pictures) to a run.

    Raises:
        FileNotFoundError: one of them is gone.
    """
    for path in paths:
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path} is gone")
        client.log_artifact(run_id, path, "report")


OPERATIONS: Mapping[str, Callable[..., str | None]] = {
    "create_experiment": create_experiment,
    "create_run": create_run,
    "log": log,
    "log_data": log_data,
    "end_run": end_run,
    "log_model": log_model,
    "register": register,
    "log_files": log_files,
}
