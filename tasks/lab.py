"""What many machines share in Prefect: work pool, slots, deployments, and who watches them.

Runs wait in the queue `runs` and hold no slot; what they send out waits in the queue `steps`,
of which each machine takes as many at once as its worker has slots. The limit `gpu` caps steps
over all machines. Its slots are leased: one whose holder dies is free again after a minute.
"""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import psutil
from prefect import get_client
from prefect.automations import Automation
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate, WorkPoolCreate
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.exceptions import ObjectNotFound
from prefect.workers.process import ProcessWorker

from graftline.errors import GraftlineError
from tasks.interruption import closed_when_stopped
from tasks.patience import is_away
from tasks.server import configured_url

POOL = "gpu"
RUNS, STEPS = "runs", "steps"
TAG = "graftline"
"""Every deployment of `prefect.yaml` has it."""
HEARTBEAT_SECONDS = 30
"""Prefect allows no shorter one."""
_AGAIN_SECONDS = 5.0
_GRACE_SECONDS = 4.0  # a process that is asked to end has so long
_MISSED = timedelta(seconds=3 * HEARTBEAT_SECONDS)
_WATCH = "graftline: a run whose machine is gone has crashed"
_log = logging.getLogger(__name__)
_ENDS = ("Completed", "Failed", "Crashed", "Cancelled", "Cancelling", "Paused", "Suspended")


def require_server() -> str:
    """The address of the lab's Prefect server.

    Raises:
        GraftlineError: none is configured.
    """
    url = configured_url()
    if url is None:
        raise GraftlineError(
            "machines meet at a Prefect server, and none is configured; start one with "
            "`prefect server start` and set PREFECT_API_URL=http://<host>:4200/api"
        )
    return url


def prepare_lab(slots: int | None) -> int:
    """Makes the work pool, its queues, the limit and the watch over runs, where they are missing.

    Args:
        slots: how many steps may compute at once, over all machines; what is there stays if
            left out, and a new limit has one slot.

    Returns:
        The limit's slots.
    """
    with get_client(sync_client=True) as client:
        try:
            client.read_work_pool(POOL)
        except ObjectNotFound:
            template = ProcessWorker.get_default_base_job_template()
            client.create_work_pool(
                WorkPoolCreate(name=POOL, type=ProcessWorker.type, base_job_template=template)
            )
        known = {queue.name for queue in client.read_work_queues(work_pool_name=POOL)}
        for queue in (RUNS, STEPS):
            if queue not in known:
                client.create_work_queue(name=queue, work_pool_name=POOL)
        try:
            there = client.read_global_concurrency_limit_by_name(POOL).limit
        except ObjectNotFound:
            there = 0
        wanted = slots or there or 1
        if not there:
            client.create_global_concurrency_limit(
                GlobalConcurrencyLimitCreate(name=POOL, limit=wanted)
            )
        elif wanted != there:
            client.upsert_global_concurrency_limit_by_name(POOL, wanted)
    _watch_runs()
    return wanted


def deploy_flows(project: Path) -> None:
    """Registers what `prefect.yaml` describes; what is registered already is brought up to date.

    Args:
        project: the folder of `prefect.yaml`.

    Raises:
        GraftlineError: there is no such file, or a deployment is refused.
    """
    file = project / "prefect.yaml"
    if not file.is_file():
        raise GraftlineError(f"{file}: is missing; deploy from the project's own folder")
    # Which folder a worker runs in is the worker's to say.
    environment = {k: v for k, v in os.environ.items() if k != "GRAFTLINE_HOME"}
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"],
        cwd=project,
        env={**environment, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise GraftlineError(f"`prefect deploy --all`: {(done.stdout + done.stderr)[-1500:]}")


def serve_work(slots: int, name: str, home: Path) -> None:
    """Takes runs and steps from the lab's queues until SIGINT or SIGTERM.

    Args:
        slots: how many steps this machine carries out at once.
        name: what the lab calls this machine.
        home: the working copy in which runs start: their data, reports and MLflow database.
    """
    os.environ["GRAFTLINE_HOME"] = str(home.absolute())
    os.environ.setdefault("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", str(HEARTBEAT_SECONDS))

    async def both() -> None:
        await asyncio.gather(
            *(
                ProcessWorker(
                    work_pool_name=POOL,
                    work_queues=[queue],
                    name=f"{name} {queue}",
                    limit=limit,
                    create_pool_if_not_found=False,
                ).start()
                for queue, limit in ((STEPS, slots), (RUNS, None))
            )
        )

    with closed_when_stopped(_end_children):
        while True:
            try:
                asyncio.run(both())
                return
            except Exception as error:
                if not _server_is_away(error):
                    raise
                _log.warning("Prefect's server does not answer; asking again")
            time.sleep(_AGAIN_SECONDS)


def _end_children() -> None:
    """Ends the runs and steps of this worker, which would compute on without it."""
    children = psutil.Process().children(recursive=True)
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.terminate()
    _, alive = psutil.wait_procs(children, timeout=_GRACE_SECONDS)
    for child in alive:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(alive, timeout=_GRACE_SECONDS)


def _server_is_away(error: BaseException) -> bool:
    """Whether a worker ended because its server was away for longer than a minute and a half."""
    if isinstance(error, BaseExceptionGroup):
        return all(_server_is_away(each) for each in error.exceptions)
    return is_away(error) or "error threshold" in str(error)


def _watch_runs() -> None:
    """A run that stops telling that it lives is marked Crashed, so that its work goes elsewhere."""
    beat = "prefect.flow-run.heartbeat"
    watch = Automation(
        name=_WATCH,
        description="A worker's machine was switched off, or its process killed.",
        trigger=EventTrigger(
            after={beat},
            expect={beat, *(f"prefect.flow-run.{end}" for end in _ENDS)},
            match={"prefect.resource.id": "prefect.flow-run.*"},
            # Runs of our deployments alone: others may tell less often that they live.
            match_related={"prefect.resource.id": f"prefect.tag.{TAG}"},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=_MISSED,
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED, message="Its process or its machine is gone."
            )
        ],
    )
    try:
        known = Automation.read(name=_WATCH)
    except ValueError:
        watch.create()
    else:
        watch.id = known.id
        watch.update()
