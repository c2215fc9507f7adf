"""Closing the runs of processes that were killed: Crashed in Prefect, KILLED in MLflow."""

from __future__ import annotations

import logging
from uuid import UUID

from prefect import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.exceptions import ObjectNotFound
from prefect.states import Crashed

from tasks.records import dead_runs
from tasks.tracking import end_run, tracking_uri

_log = logging.getLogger(__name__)


def close_dead_runs(store: str) -> int:
    """Closes every recorded run whose process is gone; returns how many there were."""
    count = 0
    for record in dead_runs(store):
        count += 1
        if "mlflow_run" in record:
            end_run(
                str(record.get("mlflow_uri", tracking_uri())), str(record["mlflow_run"]), "KILLED"
            )
        if "prefect_flow_run" in record:
            _crash(UUID(str(record["prefect_flow_run"])), int(record["pid"]))
        _log.info("closed a run of process %s, which was killed", record.get("pid"))
    return count


def _crash(flow_run_id: UUID, pid: int) -> None:
    state = Crashed(message=f"The process {pid} that ran it was killed.")
    with get_client(sync_client=True) as client:
        try:
            if client.read_flow_run(flow_run_id).state.is_final():  # type: ignore[union-attr]
                return
        except ObjectNotFound:
            return
        mine = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id]))
        for run in client.read_task_runs(flow_run_filter=mine):
            if run.state is not None and not run.state.is_final():
                client.set_task_run_state(run.id, state, force=True)
        client.set_flow_run_state(flow_run_id, state, force=True)
