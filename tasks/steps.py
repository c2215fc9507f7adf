"""One Prefect task a kind of step, all with the same body: carry it out, record it.

The artifact store decides what is reused and what runs; so Prefect's own cache is off and no
result is persisted. Only faults of input and output are retried.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from prefect import Task, task
from prefect.cache_policies import NO_CACHE
from prefect.concurrency.sync import concurrency
from prefect.tasks import exponential_backoff

from graftline.planning.plan import Reference, Step, is_done
from graftline.planning.run import PlannedScore, RunPlan
from graftline.step_code import CODE
from graftline.steps import features
from graftline.steps.execution import execute
from graftline.store import Store
from graftline.stores import open_store
from tasks.patience import patiently
from tasks.references import Place

SLOTS_VARIABLE = "GRAFTLINE_CONCURRENCY_LIMIT"
LEASE_SECONDS = 60.0
"""Prefect allows no shorter one."""
_COMPUTING = frozenset(CODE) - {"backbone", "merge", "weighted-merge", "compose", "adapters"}
FINE_TUNING = ("fine-tune", "guarded-fine-tune", "fisher")
"""Kinds that hold a backbone's weights and as much again for each of them, or more."""
_LASTING = frozenset(
    {
        errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS,
        errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ENOMEM,
    }
)  # fmt: skip

_log = logging.getLogger(__name__)


def is_passing(error: BaseException) -> bool:
    """Whether trying again may help: no matter of the disk's space, rights, names or memory.

    An error without a number is of a connection, or our own word of a file that is cut off.
    """
    if isinstance(error, ConnectionError | TimeoutError):
        return error.errno not in _LASTING
    return isinstance(error, OSError) and error.errno not in {None, *_LASTING}


def _may_retry(_task: Any, _run: Any, state: Any) -> bool:
    try:
        state.result()
    except Exception as error:  # whatever the task raised
        return is_passing(error)
    return False


def carry_out(step: Step, place: Place) -> Reference:
    """Carries one step out and records it; returns where the result lies."""
    store = open_store(place.store)
    with _slot(step.kind):
        reused = store.holds(step.kind, step.reference.fingerprint)
        artifact = execute(step, store, place.machine)
        _record(step, place, artifact.folder, reused=reused)
    return step.reference


def _carry_out_share(step: Step, place: Place, number: int) -> None:
    """Encodes one share of a modality's media; nothing is recorded before all are joined."""
    with _slot(step.kind):
        features.encode_share(step, open_store(place.store), place.machine, number)
    _log.info("%s: share %d of %d done", step.title, number, place.machine.feature_shares)


def _publish_rows(step: Step, place: Place) -> None:
    """Has the rows that a step encodes in the store, for machines without the data folder."""
    features.publish_rows(step, open_store(place.store), place.machine)


def note_reused(step: Step, place: Place) -> None:
    """Records a step that was finished before the run began."""
    _note(step, place, reused=True)


def note_done(step: Step, place: Place) -> None:
    """Records a step that was carried out for this run elsewhere, or just before it."""
    _note(step, place, reused=False)


def _note(step: Step, place: Place, *, reused: bool) -> None:
    folder = open_store(place.store).notes(step.kind, step.reference.fingerprint)
    _record(step, place, folder, reused=reused)


def _record(step: Step, place: Place, folder: Path, *, reused: bool) -> None:
    if place.tracked is not None:
        from tasks import tracking  # MLflow takes seconds, and a worker tells it nothing

        tracking.log_step(place.tracked, step, folder, reused=reused)
    _log.info("%s: %s", step.title, "reused" if reused else "done")


@contextmanager
def _slot(kind: str) -> Iterator[None]:
    """Takes a slot of the Prefect concurrency limit that `GRAFTLINE_CONCURRENCY_LIMIT` names."""
    limit = os.environ.get(SLOTS_VARIABLE)
    if not limit or kind not in _COMPUTING:
        yield
        return
    held = patiently(partial(_take, limit), f"a slot of {limit}")
    try:
        yield
    finally:
        try:
            held.close()
        except httpx.HTTPError as error:  # its lease ends by itself
            _log.warning("Prefect's server was not told that a slot is free: %s", error)


def _take(limit: str) -> ExitStack:
    """Takes a slot; closing gives it back."""
    held = ExitStack()
    # Without `strict` an unknown limit would be ignored. The lease ends a minute after its holder;
    # a holder goes on while the server is away.
    held.enter_context(
        concurrency(
            limit, strict=True, lease_duration=LEASE_SECONDS, raise_on_lease_renewal_failure=False
        )
    )
    return held


def _task(kind: str, work: Callable[..., Any], run_name: str = "{step.title}") -> Task[..., Any]:
    return task(
        name=kind,
        task_run_name=run_name,
        cache_policy=NO_CACHE,
        persist_result=False,
        retries=2,
        retry_delay_seconds=exponential_backoff(2),
        retry_jitter_factor=0.5,
        retry_condition_fn=_may_retry,
    )(work)


WEIGHTS: Mapping[str, float] = {
    "fine-tune": 8.0, "guarded-fine-tune": 12.0, "fisher": 6.0, "realign": 3.5, "align": 2.0,
    "features": 2.0, "logits": 0.5, "distil": 4.5, "realign-masked": 3.5,
}  # fmt: skip
"""About how long a step takes beside an evaluation, on the starter."""
TASKS: Mapping[str, Task[[Step, Place], Reference]] = {
    kind: _task(kind, carry_out) for kind in CODE
}
publish_rows = _task("publish-rows", _publish_rows, "{step.title}: rows")
feature_share = _task("features-share", _carry_out_share, "{step.title}, share {number}")


def by_stage(plan: RunPlan) -> list[tuple[int, list[Step]]]:
    """A plan's steps in the order in which people want to see them: stage after stage.

    Returns:
        (stage, the steps that its scores need and that no stage before it needed), parents before
        children; the experts and the text's perplexity come last, as stage 0.
    """
    groups: list[tuple[int, list[Step]]] = []
    seen: set[Reference] = set()

    def need(reference: Reference, steps: list[Step]) -> None:
        if reference in seen:
            return
        seen.add(reference)
        step = plan.steps[reference]
        for parent in step.parents.values():
            need(parent, steps)
        steps.append(step)

    for stage in [*(stage.index for stage in plan.stages), 0]:
        steps: list[Step] = []
        for score in scores_of_stage(plan, stage):
            need(score.reference, steps)
        if stage == 0:
            for reference in plan.perplexity.values():
                need(reference, steps)
        groups.append((stage, steps))
    return groups


def unfinished(plan: RunPlan, store: Store) -> list[Step]:
    """The steps of a plan that have no artifact yet."""
    return [step for step in plan.steps.values() if not is_done(step, store)]


def scores_of_stage(plan: RunPlan, stage: int) -> list[PlannedScore]:
    """What is measured at the end of a stage; 0 stands for the experts."""
    return [score for score in plan.scores if score.stage == stage]
