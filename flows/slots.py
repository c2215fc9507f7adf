"""Jobs in slots: what is ready starts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prefect import Task
from prefect.futures import PrefectFuture, as_completed
from prefect.task_runners import ThreadPoolTaskRunner


@dataclass(frozen=True)
class Job:
    """A task run to be.

    Attributes:
        name: what others call it in `needs`.
        task: the Prefect task.
        arguments: of the task.
        needs: names of jobs that must be finished before.
        weight: about how long it takes, beside other jobs.
        shared: the name under which other tasks share its limit; its task's own if left out.
    """

    name: Hashable
    task: Task[..., Any]
    arguments: Mapping[str, Any]
    needs: tuple[Hashable, ...]
    weight: float = 1.0
    shared: str | None = None

    @property
    def kind(self) -> str:
        """What its limit goes by."""
        return self.shared or self.task.name


def carry_out(
    groups: Sequence[Sequence[Job]],
    slots: int,
    limits: Mapping[str, int],
    after: Callable[[Job], None] = lambda _: None,
) -> dict[Hashable, PrefectFuture[Any]]:
    """Runs all jobs. A job takes a slot only when it is ready: none waits for another in one.

    Args:
        groups: jobs of an earlier group come first, a later one's take the slots that are left.
            Inside a group needs come before who needs them; with one slot its jobs start in this
            order, with more the one with the longest chain behind it starts first.
        slots: how many run at once.
        limits: kind -> how many jobs of that kind run at once. A place is kept for each chain that
            comes first while what it waits for is short: none of the same kind.
        after: is told of each finished job; nothing new starts meanwhile.

    Returns:
        name -> finished future.

    Raises:
        Exception: what the first job that failed raised. What has not started by then of its group
            and of later ones, does not; earlier groups go on to their end before.
    """
    group_of = {job.name: number for number, jobs in enumerate(groups) for job in jobs}
    ordered = groups if slots == 1 else [_longest_chain_first(jobs) for jobs in groups]
    waiting = [job for jobs in ordered for job in jobs]
    running: dict[PrefectFuture[Any], Job] = {}
    finished: dict[Hashable, PrefectFuture[Any]] = {}
    failures: list[Exception] = []
    with ThreadPoolTaskRunner(max_workers=slots) as runner:
        while waiting or running:
            while len(running) < slots:
                job = _ready(waiting, finished, running.values(), limits)
                if job is None:
                    break
                waiting.remove(job)
                parents = [finished[name] for name in job.needs]
                running[runner.submit(job.task, dict(job.arguments), wait_for=parents)] = job
            future = next(as_completed(list(running)))
            done = running.pop(future)
            try:
                future.result()
            except Exception as error:  # whatever the job raised
                failures.append(error)
                waiting = [job for job in waiting if group_of[job.name] < group_of[done.name]]
                continue
            finished[done.name] = future
            after(done)
    if failures:
        raise failures[0]
    return finished


def _longest_chain_first(jobs: Sequence[Job]) -> list[Job]:
    """So that slots do not stand empty at the end, while one long chain goes on alone."""
    behind: dict[Hashable, float] = {}
    for job in reversed(jobs):
        chain = behind.get(job.name, 0.0) + job.weight
        for need in job.needs:
            behind[need] = max(behind.get(need, 0.0), chain)
    return sorted(jobs, key=lambda job: -behind.get(job.name, 0.0) - job.weight)


def _ready(
    waiting: Sequence[Job],
    finished: Mapping[Hashable, PrefectFuture[Any]],
    running: Collection[Job],
    limits: Mapping[str, int],
) -> Job | None:
    busy = [job.kind for job in running]
    unfinished = {job.name: job for job in (*waiting, *running)}
    kept: Counter[str] = Counter()
    for job in waiting:
        limit = limits.get(job.kind)
        allowed = limit is None or busy.count(job.kind) + kept[job.kind] < limit
        if allowed and finished.keys() >= set(job.needs):
            return job
        if limit is not None and job.kind not in _kinds_before(job, unfinished):
            kept[job.kind] += 1
    return None


def _kinds_before(job: Job, unfinished: Mapping[Hashable, Job]) -> set[str]:
    """Kinds of the jobs that a job still waits for, directly or not."""
    kinds: set[str] = set()
    needed = [unfinished[name] for name in job.needs if name in unfinished]
    while needed:
        other = needed.pop()
        kinds.add(other.kind)
        needed += [unfinished[name] for name in other.needs if name in unfinished]
    return kinds
