"""Closing the runs of processes that end before them: Crashed in Prefect, KILLED in MLflow."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from uuid import UUID

from prefect import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.exceptions import ObjectNotFound
from prefect.states import Crashed

from tasks.records import RunRecord, dead_runs
from tasks.tracking import end_run, running_runs, tracking_uri

_log = logging.getLogger(__name__)


def close_dead_runs(store: str) -> None:
    """Closes every recorded run whose process is gone."""
    for record in dead_runs(store):
        close_run(record)
        _log.info("closed a run of process %s, which was killed", record.get("pid"))


def close_lost_runs(experiment_name: str) -> None:
    """Closes a lab's runs in MLflow whose flow run crashed with its machine."""
    for run_id, flow_run_id in running_runs(experiment_name):
        with get_client(sync_client=True) as client:
            try:
                state = client.read_flow_run(UUID(flow_run_id)).state
            except (ObjectNotFound, ValueError):
                continue  # of another Prefect server
        if state is not None and state.is_crashed():
            end_run(tracking_uri(), run_id, "KILLED")


def close_own_run(record: RunRecord) -> None:
    """Closes the run of this process, which is about to end."""
    close_run(record.content)
    record.remove()


def close_run(record: Mapping[str, str | int]) -> None:
    """Ends what a run's record names: Crashed in Prefect, KILLED in MLflow."""
    if "mlflow_run" in record:
        end_run(str(record.get("mlflow_uri", tracking_uri())), str(record["mlflow_run"]), "KILLED")
    if "prefect_flow_run" in record:
        _crash(UUID(str(record["prefect_flow_run"])), int(record["pid"]))


def _crash(flow_run_id: UUID, pid: int) -> None:
    state = Crashed(message=f"The process {pid} that ran it was stopped.")
    with get_client(sync_client=True) as client:
        try:
            now = client.read_flow_run(flow_run_id).state
        except ObjectNotFound:
            return
        if now is not None and (now.is_final() or now.is_cancelling()):
            return  # a run that is being cancelled is ended by whoever cancels it
        mine = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id]))
        for run in client.read_task_runs(flow_run_filter=mine):
            if run.state is not None and not run.state.is_final():
                client.set_task_run_state(run.id, state, force=True)
        client.set_flow_run_state(flow_run_id, state, force=True)
