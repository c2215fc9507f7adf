"""Sending steps to workers: the run waits for them, and sends them again when a machine dies."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
from prefect import get_client, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import State, StateType
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.states import Crashed

from graftline.errors import GraftlineError
from graftline.planning.plan import Step
from graftline.recipe import Recipe
from graftline.steps.together import check_processes
from graftline.steps.work import Machine
from graftline.stores import is_shared
from tasks.patience import patiently
from tasks.preflight import PreflightError
from tasks.references import Place
from tasks.steps import SLOTS_VARIABLE, note_done

DEPLOYMENT = "steps/steps"
_ATTEMPTS = 4
_POLL_SECONDS = 1.0
_PENDING_SECONDS = 120.0
_NEWS_SECONDS = 60.0

_log = logging.getLogger(__name__)
_sending = threading.Lock()


def check_machines(recipe: Recipe) -> None:
    """Whether this machine can do what the recipe asks of it, or steps can go out to workers.

    Raises:
        GraftlineError: lists what is missing, and how to make it.
    """
    problems = _limit_problems()
    if recipe.execution.where == "here":
        check_processes(Machine.of(recipe))
    else:
        problems += _dispatch_problems(recipe)
    if problems:
        raise PreflightError("\n".join(problems))


def _limit_problems() -> list[str]:
    """A concurrency limit of which steps are to take slots, and which the server does not know."""
    limit = os.environ.get(SLOTS_VARIABLE)
    if not limit:
        return []
    with get_client(sync_client=True) as client:
        try:
            client.read_global_concurrency_limit_by_name(limit)
        except ObjectNotFound:
            return [
                f"{SLOTS_VARIABLE}: {client.api_url} knows no concurrency limit {limit}; "
                f"`prefect gcl create {limit} --limit 1` makes one (`graftline deploy` makes gpu), "
                "or unset the variable"
            ]
    return []


def _dispatch_problems(recipe: Recipe) -> list[str]:
    """Why steps cannot go out to workers."""
    problems = place_problems(recipe)
    if not is_shared(recipe.store) and not Path(recipe.store).is_absolute():
        problems.append(
            f"store: {recipe.store}: other machines do not see this folder; name an object store "
            "(s3://bucket/prefix), or the absolute path of a folder that all machines share"
        )
    with get_client(sync_client=True) as client:
        try:
            client.read_deployment_by_name(DEPLOYMENT)
        except ObjectNotFound:
            problems.append(
                f"execution.where: workers: {client.api_url} knows no deployment {DEPLOYMENT}; set "
                "PREFECT_API_URL to the server that the workers ask and run `graftline deploy` "
                "once, or use --set execution.where=here"
            )
    return problems


def place_problems(recipe: Recipe) -> list[str]:
    """Weights of the user's own that only this machine finds: workers read them, too."""
    models: dict[str, Any] = {"backbone.source": recipe.backbone.source}
    models |= {f"modalities.{name}.encoder": recipe.modality(name).encoder for name in recipe.order}
    return [
        f"{key}.{given}: {place}: other machines do not see this place; name the absolute path of "
        "one that all machines share"
        for key, model in models.items()
        for given in ("folder", "gguf")
        if (place := getattr(model, given, None)) is not None and not Path(place).is_absolute()
    ]


@dataclass(frozen=True)
class Chain:
    """Steps that travel together, parents before children.

    Attributes:
        steps: in order.
        share: of the only step, which is `features`, this share alone, from 1; 0: the whole step.
    """

    steps: tuple[Step, ...]
    share: int = 0

    @property
    def title(self) -> str:
        """What people read."""
        first, *others = (step.title for step in self.steps)
        title = " + ".join([first, *(title.rpartition(": ")[2] for title in others)])
        return f"{title}, share {self.share}" if self.share else title


@task(
    name="on-a-worker",
    task_run_name="{chain.title}",
    cache_policy=NO_CACHE,
    persist_result=False,
)
def on_a_worker(
    chain: Chain,
    recipe: Mapping[str, Any],
    common: Mapping[str, Any],
    data_files: Mapping[str, Mapping[str, str]],
    place: Place,
) -> None:
    """Has steps carried out by whichever worker is free, and records them.

    Raises:
        GraftlineError: they fail there, or several machines died of them.
    """
    parameters = {
        "recipe": recipe,
        "common": common,
        "data_files": data_files,
        "references": [f"{step.kind}/{step.reference.fingerprint}" for step in chain.steps],
        "share": chain.share,
    }
    for _ in range(_ATTEMPTS):
        # A request that nobody answered may have been heard: hence the key.
        send = partial(_send, chain.title, parameters, str(uuid4()))
        state = _final_state(patiently(send, chain.title), chain.title)
        if state.is_completed():
            for step in () if chain.share else chain.steps:
                note_done(step, place)
            return
        if not state.is_crashed():
            raise GraftlineError(f"{chain.title}: on a worker: {state.message or state.name}")
        _log.warning("%s: its machine is gone (%s); sent again", chain.title, state.message)
    raise GraftlineError(
        f"{chain.title}: {_ATTEMPTS} workers ended in the middle of it; see their logs (memory?) "
        "and run again. Finished steps are kept."
    )


def _send(title: str, parameters: dict[str, Any], key: str) -> UUID:
    """Sends a flow run out and returns its id; the same key means the same run."""
    with _sending:  # Prefect numbers what a run sends out, one at a time
        run = run_deployment(
            DEPLOYMENT,
            parameters=parameters,
            flow_run_name=title,
            timeout=0,
            idempotency_key=key,
        )
    return UUID(str(run.id))


def _final_state(flow_run_id: UUID, title: str) -> State[Any]:
    """Waits for the end of a flow run, however long a worker or the server is away."""
    pending_since: float | None = None
    told = time.monotonic()
    with get_client(sync_client=True) as client:
        while True:
            state = _state(client, flow_run_id)
            now = time.monotonic()
            if state is not None and state.is_final():
                return state
            kind = state.type if state is not None else None
            pending_since = (pending_since or now) if kind == StateType.PENDING else None
            if pending_since is not None and now - pending_since > _PENDING_SECONDS:
                # Its worker took it and died before the run could tell that it lives.
                _give_up(client, flow_run_id)
            if kind == StateType.SCHEDULED and now - told > _NEWS_SECONDS:
                told = now
                _log.info("%s: waits for a worker; `graftline work` starts one", title)
            time.sleep(_POLL_SECONDS)


def _give_up(client: SyncPrefectClient, flow_run_id: UUID) -> None:
    """Marks a run as crashed; where the server does not answer, the next look does."""
    lost = Crashed(message="The worker that took it never started it.")
    with suppress(httpx.HTTPError):
        client.set_flow_run_state(flow_run_id, lost, force=True)


def _state(client: SyncPrefectClient, flow_run_id: UUID) -> State[Any] | None:
    """The state of a flow run; None while the server does not answer."""
    try:
        return client.read_flow_run(flow_run_id).state
    except httpx.HTTPError:
        return None
