"""MLflow: one experiment a recipe, a parent run a flow run, a child run a stage.

Everything goes through `MlflowClient` with explicit run ids: MLflow's notion of an active run
does not reach the threads of submitted tasks. What a tracking server cannot be told because it is
away waits in `mlruns/journal-*.jsonl`, and no run fails or stops for that.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import mlflow
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME

from graftline.errors import GraftlineError
from graftline.object_urls import without_credentials
from graftline.planning.plan import Step
from graftline.recipe import Recipe
from tasks.journal import PROMISED, Journal, Refused
from tasks.mlflow_calls import ENTRY, OPERATIONS, perform
from tasks.outputs import read_object
from tasks.references import DataVersion, TrackedRun

FOLDER = Path("mlruns")
_LAST_SECONDS = 60.0
"""How long a finished run waits for a server to tell it the end; then the next run does."""
_children = threading.Lock()
_child_ids: dict[tuple[str, int], str] = {}
_parent_tags: dict[str, Mapping[str, str]] = {}
_ended: set[str] = set()  # parent runs; a thread that goes on computing opens no child of them


def tracking_uri() -> str:
    """`MLFLOW_TRACKING_URI` where it is set, else the project's own database."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{FOLDER / 'mlflow.db'}"


@cache
def _client(uri: str) -> MlflowClient:
    mlflow.set_tracking_uri(uri)
    return MlflowClient(tracking_uri=uri)


@cache
def _journal(uri: str, folder: Path) -> Journal:
    name = hashlib.sha256(uri.encode()).hexdigest()[:12]
    return Journal(folder / f"journal-{name}.jsonl", partial(perform, _client(uri)))


def is_server(uri: str) -> bool:
    """Whether runs are recorded by a server, not in a database of this machine."""
    return uri.startswith(("http:", "https:"))


def _tell(uri: str, operation: str, **arguments: Any) -> str:
    """Carries out one of `OPERATIONS`; where a server is away, it is noted and told later."""
    if not is_server(uri):
        return OPERATIONS[operation](_client(uri), **arguments) or ""
    return _journal(uri, FOLDER.absolute()).call(operation, **arguments)


def _new_run(uri: str, experiment_id: str, tags: Mapping[str, str]) -> str:
    entry = {ENTRY: uuid.uuid4().hex} if is_server(uri) else {}
    return _tell(
        uri,
        "create_run",
        experiment_id=experiment_id,
        tags={**tags, **entry},
        start_time=_now(),
    )


def deliver(seconds: float = 0.0) -> bool:
    """Tells a tracking server what it missed, waiting so long for it; says if nothing is left."""
    uri = tracking_uri()
    return not is_server(uri) or _journal(uri, FOLDER.absolute()).deliver_within(seconds)


def experiment(name: str) -> tuple[str, str]:
    """Returns the tracking URI and the id of a recipe's experiment, made if absent.

    The database is created and migrated here, before any fan-out, by one process at a time.
    """
    uri = tracking_uri()
    FOLDER.mkdir(exist_ok=True)
    with FileLock(FOLDER / ".create.lock"):
        own = uri.startswith("sqlite:")
        location = (FOLDER / "artifacts" / name).absolute().as_uri() if own else None
        return uri, _tell(uri, "create_experiment", name=name, location=location)


@contextmanager
def tracked_run(
    recipe: Recipe, name: str, fingerprint: str, data: DataVersion, tags: Mapping[str, str]
) -> Iterator[TrackedRun]:
    """A parent run while the context lasts; it ends FINISHED, FAILED or KILLED, as is true."""
    deliver()
    uri, experiment_id = experiment(recipe.name)
    run_tags = {
        MLFLOW_RUN_NAME: name,
        "method": recipe.method,
        "order": ",".join(recipe.order),
        "seed": str(recipe.seed),
        "data_md5": data.md5,
        "fingerprint": fingerprint,
        **tags,
    }
    tracked = TrackedRun(uri, experiment_id, _new_run(uri, experiment_id, run_tags))
    _parent_tags[tracked.run_id] = run_tags
    status = "FINISHED"
    try:
        settings = flat(recipe.model_dump(mode="json", exclude={"execution", "store"}))
        _tell(uri, "log", run_id=tracked.run_id, params=settings)
        _tell(
            uri,
            "log_data",
            run_id=tracked.run_id,
            name=Path(data.folder).absolute().name,
            digest=data.md5[:36],
            source=data.source,
            profile=json.dumps(data.files, default=dict)[:16_000],
        )
        yield tracked
    except Exception:
        status = "FAILED"
        raise
    except BaseException:
        status = "KILLED"
        raise
    finally:
        end_run(tracked.uri, tracked.run_id, status)
        deliver(_LAST_SECONDS if status == "FINISHED" else 0.0)


def end_run(uri: str, run_id: str, status: str) -> None:
    """Ends a run and those of its children that are still running.

    Args:
        uri: of the tracking server.
        run_id: the parent run.
        status: FINISHED, FAILED or KILLED.
    """
    with _children:
        _ended.add(run_id)
    with suppress(MlflowException, Refused):
        _tell(uri, "end_run", run_id=run_id, status=status, end_time=_now())


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
    query = f"tags.comparison = '{tags['comparison']}' and attributes.status = 'FINISHED'"
    if _found_run(uri, experiment_id, query):
        yield None
        return
    run_id = _new_run(uri, experiment_id, {MLFLOW_RUN_NAME: name, **tags})
    tracked, status = TrackedRun(uri, experiment_id, run_id), "FAILED"
    try:
        yield tracked
        status = "FINISHED"
    finally:
        end_run(uri, tracked.run_id, status)


def _found_run(uri: str, experiment_id: str, query: str) -> str | None:
    """The id of a run that matches; None where a server that is away cannot be asked."""
    if PROMISED in experiment_id + query:
        return None
    try:
        found = _client(uri).search_runs([experiment_id], query, max_results=1)
    except MlflowException:
        if is_server(uri):
            return None
        raise
    return str(found[0].info.run_id) if found else None


def running_runs(experiment_name: str) -> list[tuple[str, str]]:
    """Ids in MLflow and in Prefect of a server's unfinished runs; none where it is away."""
    uri = tracking_uri()
    if not is_server(uri):
        return []
    with suppress(MlflowException):
        found = _client(uri).get_experiment_by_name(experiment_name)
        query = "attributes.status = 'RUNNING' and tags.prefect_flow_run_id != ''"
        runs = _client(uri).search_runs([found.experiment_id], query) if found else []
        return [(run.info.run_id, run.data.tags["prefect_flow_run_id"]) for run in runs]
    return []


def method_run(tracked: TrackedRun, name: str, tags: Mapping[str, str]) -> str:
    """Returns the id of a new child run of a comparison, for one method."""
    own = {MLFLOW_PARENT_RUN_ID: tracked.run_id, MLFLOW_RUN_NAME: name, **tags}
    return _new_run(tracked.uri, tracked.experiment_id, own)


def stage_run(tracked: TrackedRun, stage: int) -> str:
    """Returns the id of a stage's child run, which is made when it is first asked for.

    Raises:
        GraftlineError: the run has ended: a thread that goes on computing opens no child of it.
    """
    query = f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{tracked.run_id}' and tags.stage = '{stage}'"
    with _children:
        if tracked.run_id in _ended:
            raise GraftlineError(f"the MLflow run {tracked.run_id} has ended")
        if (tracked.run_id, stage) in _child_ids:
            return _child_ids[tracked.run_id, stage]
        found = _found_run(tracked.uri, tracked.experiment_id, query)
        if found:  # by another process of the same run
            return found
        known = _parent_tags.get(tracked.run_id)
        known = known or _client(tracked.uri).get_run(tracked.run_id).data.tags
        copied = ("method", "order", "seed", "data_md5", "fingerprint")
        tags = {key: known[key] for key in copied if key in known}
        label = "base and experts"
        if stage:
            label = f"stage {stage}: {known['order'].split(',')[stage - 1]}"
        tags |= {
            MLFLOW_PARENT_RUN_ID: tracked.run_id,
            MLFLOW_RUN_NAME: label,
            "stage": str(stage),
        }
        made = _new_run(tracked.uri, tracked.experiment_id, tags)
        _child_ids[tracked.run_id, stage] = made
        return made


def log_step(tracked: TrackedRun, step: Step, folder: Path, *, reused: bool) -> None:
    """Records a finished step on its stage's run: losses, speed, where the artifact lies."""
    run_id = stage_run(tracked, step.stage)
    chosen = step.parameters.get("modalities") or [step.parameters.get("modality")]
    key = ".".join([step.kind, *(str(name) for name in chosen if name)])
    now = _now()
    metrics: list[tuple[str, float, int, int]] = []
    history = read_object(folder / "history.json")
    for i, loss in enumerate(history.get("losses", []), start=1):
        metrics.append((f"loss.{key}", float(loss), now, i))
    for i, norm in enumerate(history.get("norms", []), start=1):
        metrics.append((f"gradient_norm.{key}", float(norm), now, i))
    timing = read_object(folder / "timing.json")
    if "seconds" in timing:
        metrics.append((f"seconds.{key}", float(timing["seconds"]), now, 0))
        # Tokens are those of all sessions of a step that was killed, these seconds the last one's.
        whole = "last_session_seconds" not in timing and timing["seconds"] > 0
        if history.get("tokens") and whole:
            speed = history["tokens"] / timing["seconds"]
            metrics.append((f"tokens_per_second.{key}", speed, now, 0))
    note = f"{step.kind}/{step.reference.fingerprint}"
    name = f"artifact.{key}"
    if step.kind == "evaluate":  # a stage asks several models about one modality
        name += f".{step.reference.fingerprint[:12]}"
    if reused:  # by a run of this experiment that computed it, if there is one
        origin = _found_run(tracked.uri, tracked.experiment_id, f"tags.`{name}` = '{note}'")
        note += f" (reused from {origin})" if origin else " (reused)"
    _tell(tracked.uri, "log", run_id=run_id, metrics=metrics, tags={name: note})


def log_numbers(run_id: str, uri: str, numbers: Mapping[str, float], step: int) -> None:
    """Records numbers of one stage on one run."""
    now = _now()
    _tell(uri, "log", run_id=run_id, metrics=[(k, v, now, step) for k, v in numbers.items()])


def log_model(
    tracked: TrackedRun,
    run_id: str,
    name: str,
    where: str,
    tags: Mapping[str, str],
    numbers: Mapping[str, float],
    stage: int,
    links: Mapping[str, Any] | None = None,
) -> str:
    """Records a checkpoint as a model that lies in the artifact store; no weights are copied.

    Args:
        tracked: the parent run.
        run_id: the stage's run.
        name: of the model.
        where: where its backbone lies.
        tags: of the model.
        numbers: its scores.
        stage: their step.
        links: where all of it lies (`graftline.asking.links`), if MLflow is to load and serve it.

    Returns:
        The model's id in MLflow.
    """
    return _tell(
        tracked.uri,
        "log_model",
        experiment_id=tracked.experiment_id,
        run_id=run_id,
        name=name,
        tags={**tags, "artifact_path": where},
        numbers=dict(numbers),
        step=stage,
        links=None if links is None else {**links},
        parent_run=tracked.run_id,
        now=_now(),
    )


def register(name: str, model_id: str, run_id: str, alias: str, tags: Mapping[str, str]) -> None:
    """Registers a run's last model and points the method's alias at it.

    A model of the same fingerprint that was registered before is not registered again.
    """
    given = {"name": name, "model_id": model_id, "run_id": run_id, "alias": alias}
    _tell(tracking_uri(), "register", **given, tags=dict(tags))


def registered_tags(name: str, alias: str | None, version: str | None) -> dict[str, str]:
    """The tags of a registered model's version: method, seed, order, data_md5, fingerprint.

    Args:
        name: the recipe's name.
        alias: the version's alias, which is a method; or None.
        version: the version's number where there is no alias.

    Raises:
        GraftlineError: there is no such version; says which names and aliases there are. Or MLflow
            cannot be asked.
    """
    uri = tracking_uri()
    models: list[Any] = []
    try:
        if not uri.startswith("sqlite:///") or Path(uri.removeprefix("sqlite:///")).is_file():
            client = _client(uri)
            with suppress(MlflowException):
                found = (
                    client.get_model_version_by_alias(name, alias)
                    if alias is not None
                    else client.get_model_version(name, str(version))
                )
                return dict(found.tags)
            models = list(client.search_registered_models())
    except MlflowException as error:
        said = f"MLFLOW_TRACKING_URI: {uri} cannot be asked ({str(error).splitlines()[0][:200]})"
        advice = "start its server, or correct the address"
        raise GraftlineError(f"{without_credentials(said)}; {advice}") from error
    known = sorted(f"{model.name}@{each}" for model in models for each in model.aliases)
    raise GraftlineError(
        f"{name}{'@' if alias else '/'}{alias or version}: no such registered model; "
        f"there are: {', '.join(known) or 'none in this project yet'}"
    )


def tag_run(tracked: TrackedRun, tags: Mapping[str, str]) -> None:
    """Adds tags to the parent run."""
    _tell(tracked.uri, "log", run_id=tracked.run_id, tags=dict(tags))


def log_files(tracked: TrackedRun, files: Sequence[Path]) -> None:
    """Copies small files (report and pictures) to the parent run."""
    paths = [str(path.absolute()) for path in files]
    _tell(tracked.uri, "log_files", run_id=tracked.run_id, paths=paths)


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


def _now() -> int:
    return int(time.time() * 1000)
