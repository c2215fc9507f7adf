"""Which steps go out to workers, and together with which."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from flows.slots import Job
from graftline.plan import Step
from graftline.run_plan import RunPlan
from tasks.dispatch import Chain, on_a_worker
from tasks.references import DataVersion, Place

HERE = ("backbone", "features")
"""Kinds that read the data folder or a package: they run where the run was started."""
WAITING = 64
"""How many sent jobs a run waits for at once: a thread each, that sleeps."""


def sent_out(jobs: Sequence[Job], plan: RunPlan, place: Place, data: DataVersion) -> list[Job]:
    """Jobs that send steps out, and what stays.

    A step travels with the one before it if that one has no other successor among what is sent:
    an expert is aligned, fine-tuned and asked in one go; connectors that are realigned and
    modalities that are asked go out side by side.

    Args:
        jobs: what a run does here, needs before who needs them.
        plan: the run.
        place: where its artifacts lie.
        data: the data's version.
    """
    travels = {
        job.name: job.arguments["step"]
        for job in jobs
        if isinstance(job.arguments.get("step"), Step) and job.arguments["step"].kind not in HERE
    }
    chains = _chains(jobs, travels)
    head = {name: chain[0] for chain in chains for name in chain}
    last = {chain[-1]: chain for chain in chains}
    by_name = {job.name: job for job in jobs}
    found = []
    for job in jobs:
        if job.name in travels and job.name not in last:
            continue  # goes with a later one
        chain = last.get(job.name, [job.name])
        needs = [head.get(n, n) for name in chain for n in by_name[name].needs]
        outside = tuple(dict.fromkeys(n for n in needs if n != chain[0]))
        if job.name not in travels:
            kind = "here" if "step" in job.arguments else job.shared
            found.append(Job(job.name, job.task, job.arguments, outside, job.weight, kind))
            continue
        weight = sum(by_name[name].weight for name in chain)
        steps = Chain(tuple(travels[name] for name in chain))
        arguments = {
            "chain": steps,
            "recipe": plan.recipe.model_dump(mode="json"),
            "data_files": {name: dict(files) for name, files in data.files.items()},
            "place": place,
        }
        found.append(Job(chain[0], on_a_worker, arguments, outside, weight))
    return found


def _chains(jobs: Sequence[Job], travels: dict[Hashable, Step]) -> list[list[Hashable]]:
    followers: dict[Hashable, int] = {}
    for job in jobs:
        for name in job.needs if job.name in travels else ():
            followers[name] = followers.get(name, 0) + 1
    chain_of: dict[Hashable, list[Hashable]] = {}
    for job in jobs:
        if job.name in travels:
            before = [name for name in job.needs if name in travels]
            alone = len(before) == 1 and followers[before[0]] == 1
            chain = chain_of[before[0]] if alone else []
            chain.append(job.name)
            chain_of[job.name] = chain
    return list({id(chain): chain for chain in chain_of.values()}.values())
