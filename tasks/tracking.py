"""MLflow: one experiment a recipe, a parent run a flow run, a child run a stage.

Everything goes through `MlflowClient` with explicit run ids: MLflow's notion of an active run
does not reach the threads of submitted tasks.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import mlflow
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME

from graftline.asking.parts import Parts
from graftline.errors import GraftlineError
from graftline.plan import Step
from graftline.recipe import Recipe
from tasks.outputs import read_object
from tasks.references import DataVersion, TrackedRun

FOLDER = Path("mlruns")
_BATCH = 1000
_children = threading.Lock()
_child_ids: dict[tuple[str, int], str] = {}
_ended: set[str] = set()  # parent runs; a thread that goes on computing opens no child of them


def tracking_uri() -> str:
    """`MLFLOW_TRACKING_URI` where it is set, else the project's own database."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{FOLDER / 'mlflow.db'}"


@cache
def _client(uri: str) -> MlflowClient:
    mlflow.set_tracking_uri(uri)
    return MlflowClient(tracking_uri=uri)


def experiment(name: str) -> tuple[str, str]:
    """Returns the tracking URI and the id of a recipe's experiment, made if absent.

    The database is created and migrated here, before any fan-out, by one process at a time.
    """
    uri = tracking_uri()
    FOLDER.mkdir(exist_ok=True)
    with FileLock(FOLDER / ".create.lock"):
        client = _client(uri)
        found = client.get_experiment_by_name(name)
        if found is not None:
            return uri, str(found.experiment_id)
        own = uri.startswith("sqlite:")
        location = (FOLDER / "artifacts" / name).absolute().as_uri() if own else None
        return uri, str(client.create_experiment(name, artifact_location=location))


@contextmanager
def tracked_run(
    recipe: Recipe, name: str, fingerprint: str, data: DataVersion, tags: Mapping[str, str]
) -> Iterator[TrackedRun]:
    """A parent run while the context lasts; it ends FINISHED, FAILED or KILLED, as is true."""
    uri, experiment_id = experiment(recipe.name)
    client = _client(uri)
    run_tags = {
        MLFLOW_RUN_NAME: name,
        "method": recipe.method,
        "order": ",".join(recipe.order),
        "seed": str(recipe.seed),
        "data_md5": data.md5,
        "fingerprint": fingerprint,
        **tags,
    }
    run = client.create_run(experiment_id, tags=run_tags)
    tracked = TrackedRun(uri, experiment_id, run.info.run_id)
    status = "FINISHED"
    try:
        settings = flat(recipe.model_dump(mode="json", exclude={"execution", "store"}))
        client.log_batch(tracked.run_id, params=[Param(k, v[:6000]) for k, v in settings.items()])
        _log_data(client, tracked.run_id, data)
        yield tracked
    except Exception:
        status = "FAILED"
        raise
    except BaseException:
        status = "KILLED"
        raise
    finally:
        end_run(tracked.uri, tracked.run_id, status)


def end_run(uri: str, run_id: str, status: str) -> None:
    """Ends a run and those of its children that are still running.

    Args:
        uri: of the tracking server.
        run_id: the parent run.
        status: FINISHED, FAILED or KILLED.
    """
    client = _client(uri)
    with _children:
        _ended.add(run_id)
    with suppress(MlflowException):
        parent = client.get_run(run_id)
        query = f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{run_id}' and attributes.status = 'RUNNING'"
        for child in client.search_runs([parent.info.experiment_id], query):
            client.set_terminated(child.info.run_id, status)
        if parent.info.status == "RUNNING":
            client.set_terminated(run_id, status)


@contextmanager
def comparison_run(
    experiment_name: str, name: str, tags: Mapping[str, str]
) -> Iterator[TrackedRun | None]:
    """A parent run for a comparison while the context lasts; its children are the methods.

    Args:
        experiment_name: the recipe's name.
        name: of the run.
        tags: of the run; among them `comparison`, the identity of what is compared.

    Yields:
        The run; `None` if the same comparison is recorded already.
    """
    uri, experiment_id = experiment(experiment_name)
    client = _client(uri)
    query = f"tags.comparison = '{tags['comparison']}' and attributes.status = 'FINISHED'"
    if client.search_runs([experiment_id], query, max_results=1):
        yield None
        return
    run = client.create_run(experiment_id, tags={MLFLOW_RUN_NAME: name, **tags})
    tracked, status = TrackedRun(uri, experiment_id, run.info.run_id), "FAILED"
    try:
        yield tracked
        status = "FINISHED"
    finally:
        end_run(uri, tracked.run_id, status)


def method_run(tracked: TrackedRun, name: str, tags: Mapping[str, str]) -> str:
    """Returns the id of a new child run of a comparison, for one method."""
    own = {MLFLOW_PARENT_RUN_ID: tracked.run_id, MLFLOW_RUN_NAME: name, **tags}
    client = _client(tracked.uri)
    return str(client.create_run(tracked.experiment_id, tags=own).info.run_id)


def stage_run(tracked: TrackedRun, stage: int) -> str:
    """Returns the id of a stage's child run, which is made when it is first asked for."""
    client = _client(tracked.uri)
    query = f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{tracked.run_id}' and tags.stage = '{stage}'"
    with _children:
        if tracked.run_id in _ended:
            raise GraftlineError(f"the MLflow run {tracked.run_id} has ended")
        if (tracked.run_id, stage) in _child_ids:
            return _child_ids[tracked.run_id, stage]
        found = client.search_runs([tracked.experiment_id], query, max_results=1)
        if found:  # by another process of the same run
            return str(found[0].info.run_id)
        parent = client.get_run(tracked.run_id)
        copied = ("method", "order", "seed", "data_md5", "fingerprint")
        tags = {key: parent.data.tags[key] for key in copied if key in parent.data.tags}
        label = "base and experts"
        if stage:
            label = f"stage {stage}: {parent.data.tags['order'].split(',')[stage - 1]}"
        tags |= {
            MLFLOW_PARENT_RUN_ID: tracked.run_id,
            MLFLOW_RUN_NAME: label,
            "stage": str(stage),
        }
        made = str(client.create_run(tracked.experiment_id, tags=tags).info.run_id)
        _child_ids[tracked.run_id, stage] = made
        return made


def log_step(tracked: TrackedRun, step: Step, folder: Path, *, reused: bool) -> None:
    """Records a finished step on its stage's run: losses, speed, where the artifact lies."""
    run_id = stage_run(tracked, step.stage)
    client = _client(tracked.uri)
    chosen = step.parameters.get("modalities") or [step.parameters.get("modality")]
    key = ".".join([step.kind, *(str(name) for name in chosen if name)])
    now = _now()
    metrics: list[Metric] = []
    history = read_object(folder / "history.json")
    for i, loss in enumerate(history.get("losses", []), start=1):
        metrics.append(Metric(f"loss.{key}", float(loss), now, i))
    for i, norm in enumerate(history.get("norms", []), start=1):
        metrics.append(Metric(f"gradient_norm.{key}", float(norm), now, i))
    timing = read_object(folder / "timing.json")
    if "seconds" in timing:
        metrics.append(Metric(f"seconds.{key}", float(timing["seconds"]), now, 0))
        if history.get("tokens") and timing["seconds"] > 0:
            speed = history["tokens"] / timing["seconds"]
            metrics.append(Metric(f"tokens_per_second.{key}", speed, now, 0))
    for start in range(0, len(metrics), _BATCH):
        client.log_batch(run_id, metrics=metrics[start : start + _BATCH])
    reference = step.reference
    note = f"{step.kind}/{reference.fingerprint}{' (reused)' if reused else ''}"
    name = f"artifact.{key}" if step.kind != "evaluate" else f"artifact.{key}.{note[9:21]}"
    client.log_batch(run_id, tags=[RunTag(name, note)])


def log_numbers(run_id: str, uri: str, numbers: Mapping[str, float], step: int) -> None:
    """Records numbers of one stage on one run."""
    now = _now()
    _client(uri).log_batch(run_id, metrics=[Metric(k, v, now, step) for k, v in numbers.items()])


def log_model(
    tracked: TrackedRun,
    run_id: str,
    name: str,
    folder: Path,
    tags: Mapping[str, str],
    numbers: Mapping[str, float],
    stage: int,
    parts: Parts | None = None,
) -> str:
    """Records a checkpoint as a model that lies in the artifact store; no weights are copied.

    Args:
        tracked: the parent run.
        run_id: the stage's run.
        name: of the model.
        folder: where its backbone lies.
        tags: of the model.
        numbers: its scores.
        stage: their step.
        parts: where all of it lies, if it is to be loaded and served by MLflow.

    Returns:
        The model's id in MLflow.
    """
    client = _client(tracked.uri)
    make = mlflow.create_external_model if parts is None else mlflow.initialize_logged_model
    model = make(
        name=name,
        source_run_id=run_id,
        tags={**tags, "artifact_path": str(folder)},
        experiment_id=tracked.experiment_id,
        model_type="multimodal",
    )
    model_id = str(model.model_id)
    if parts is not None:
        from mlflow.models import Model

        from tasks.serving import write_served  # takes seconds to import, and only here

        notes = {**tags, "run_id": tracked.run_id, "stage_run_id": run_id}
        with tempfile.TemporaryDirectory() as temporary:
            written = Path(temporary) / "model"
            write_served(parts, written, Model(run_id=run_id, model_id=model_id), notes)
            client.log_model_artifacts(model_id, str(written))
        client.finalize_logged_model(model_id, "READY")
    for key, value in numbers.items():
        client.log_metric(run_id, key, value, step=stage, model_id=model_id)
    return model_id


def register(name: str, model_id: str, run_id: str, alias: str, tags: Mapping[str, str]) -> str:
    """Registers a run's last model and points the method's alias at it.

    A model of the same fingerprint that was registered before is not registered again.

    Returns:
        The version.
    """
    client = _client(tracking_uri())
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


def registered_tags(name: str, alias: str | None, version: str | None) -> dict[str, str]:
    """The tags of a registered model's version: method, seed, order, data_md5, fingerprint.

    Args:
        name: the recipe's name.
        alias: the version's alias, which is a method; or None.
        version: the version's number where there is no alias.

    Raises:
        GraftlineError: there is no such version; says which names and aliases there are.
    """
    uri = tracking_uri()
    client = None
    if not uri.startswith("sqlite:///") or Path(uri.removeprefix("sqlite:///")).is_file():
        client = _client(uri)
        with suppress(MlflowException):
            found = (
                client.get_model_version_by_alias(name, alias)
                if alias is not None
                else client.get_model_version(name, str(version))
            )
            return dict(found.tags)
    models = client.search_registered_models() if client is not None else []
    known = sorted(f"{model.name}@{each}" for model in models for each in model.aliases)
    raise GraftlineError(
        f"{name}{'@' if alias else '/'}{alias or version}: no such registered model; "
        f"there are: {', '.join(known) or 'none in this project yet'}"
    )


def tag_run(tracked: TrackedRun, tags: Mapping[str, str]) -> None:
    """Adds tags to the parent run."""
    _client(tracked.uri).log_batch(tracked.run_id, tags=[RunTag(k, v) for k, v in tags.items()])


def log_files(tracked: TrackedRun, files: Sequence[Path]) -> None:
    """Copies small files (report and pictures) to the parent run."""
    for path in files:
        _client(tracked.uri).log_artifact(tracked.run_id, str(path), "report")


def flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A nested mapping as dotted keys."""
    found: dict[str, str] = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = (
                ",".join(map(str, value)) if isinstance(value, list) else str(value)
            )
    return found


def _log_data(client: MlflowClient, run_id: str, data: DataVersion) -> None:
    dataset = Dataset(
        name=Path(data.folder).name,
        digest=data.md5[:36],
        source_type="dvc",
        source=json.dumps({"uri": data.source}),
        profile=json.dumps(data.files, default=dict)[:16_000],
    )
    tags = [InputTag(MLFLOW_DATASET_CONTEXT, "training")]
    client.log_inputs(run_id, datasets=[DatasetInput(dataset, tags)])


def _now() -> int:
    return int(time.time() * 1000)
