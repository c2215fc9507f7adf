"""Where steps run: in this machine's slots, or out on workers, and together with which."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from prefect.futures import PrefectFuture

from flows.slots import Job, carry_out
from graftline.planning.plan import Step, is_done
from graftline.planning.run import RunPlan
from graftline.recipe import ExecutionSettings, Recipe
from graftline.stores import open_store
from tasks.dispatch import Chain, on_a_worker
from tasks.references import DataVersion, Place
from tasks.steps import FINE_TUNING, TASKS, WEIGHTS, by_stage, publish_rows

HERE = ("backbone",)
"""Kinds that read a folder of the user's: they run where the run was started."""
_WAITING = 64  # how many sent jobs a run waits for at once: a thread each, that sleeps


def step_job(step: Step, place: Place, needs: tuple[Hashable, ...]) -> Job:
    """A step as a job of this machine."""
    shared = "fine-tune" if step.kind in FINE_TUNING else None
    arguments = {"step": step, "place": place}
    weight = WEIGHTS.get(step.kind, 1.0)
    return Job(step.reference, TASKS[step.kind], arguments, needs, weight, shared)


def carry_out_jobs(
    groups: Sequence[Sequence[Job]],
    recipes: Mapping[Hashable, Recipe],
    execution: ExecutionSettings,
    place: Place,
    data: DataVersion,
    after: Callable[[Job], None] = lambda _: None,
) -> dict[Hashable, PrefectFuture[Any]]:
    """Runs all jobs where the recipe says: here, or their steps on workers.

    Holds no slot while it waits for workers.

    Args:
        groups: as for `flows.slots.carry_out`; workers get all at once.
        recipes: job of a step -> a recipe whose plan has that step.
        execution: where, and how many at once.
        place: where artifacts lie.
        data: the data's version.
        after: is told of each finished job.

    Returns:
        name -> finished future; steps that travel together have the first one's name.
    """
    if execution.where == "here":
        return carry_out(groups, execution.slots, {"fine-tune": execution.fine_tunings}, after)
    sent = sent_out([job for jobs in groups for job in jobs], recipes, place, data)
    slots = max(place.machine.slots, min(len(sent), _WAITING))
    return carry_out([sent], slots, {"here": place.machine.slots}, after)


def compute_lacking(
    plans: Sequence[RunPlan],
    place: Place,
    data: DataVersion,
    ready: Callable[[int, Sequence[Step]], None],
) -> None:
    """Computes what several runs lack, side by side; what they share, once.

    Args:
        plans: of the runs; what an earlier one lacks comes first.
        place: where artifacts lie.
        data: the data's version.
        ready: is told the number of each plan, from 0, whose steps are all there, and which steps,
            of whichever plans, were computed since it was told so before.
    """
    store = open_store(place.store)
    groups: list[list[Job]] = []
    recipes: dict[Hashable, Recipe] = {}
    done: set[Hashable] = set()
    lacking: dict[int, set[Hashable]] = {}
    for number, plan in enumerate(plans):
        jobs: list[Job] = []
        lacks: set[Hashable] = set()
        for step in (step for _, steps in by_stage(plan) for step in steps):
            name = step.reference
            if name not in recipes and (name in done or is_done(step, store)):
                done.add(name)
                continue
            lacks.add(name)
            if name not in recipes:
                recipes[name] = plan.recipe
                needs = tuple(parent for parent in step.parents.values() if parent in recipes)
                jobs.append(step_job(step, place, needs))
        groups.append(jobs)
        lacking[number] = lacks
    recent: list[Step] = []

    def tell(finished: Sequence[Step]) -> None:
        recent.extend(finished)
        for lacks in lacking.values():
            lacks -= {step.reference for step in finished}
        for number in [number for number, lacks in lacking.items() if not lacks]:
            del lacking[number]
            ready(number, tuple(recent))
            recent.clear()

    tell(())
    if recipes:
        execution = plans[0].recipe.execution
        carry_out_jobs(groups, recipes, execution, place, data, lambda job: tell(_steps_of(job)))


def _steps_of(job: Job) -> Sequence[Step]:
    """The steps that a job finishes, on whichever machine."""
    chain = job.arguments.get("chain")
    if chain is not None:
        return chain.steps if not chain.share else ()
    step: Step = job.arguments["step"]
    return (step,) if step.reference == job.name else ()  # rows alone finish no step


def sent_out(
    jobs: Sequence[Job], recipes: Mapping[Hashable, Recipe], place: Place, data: DataVersion
) -> list[Job]:
    """Jobs that send steps out, and what stays; see `carry_out_jobs`.

    A step travels with the one before it if that one has no other successor among what is sent:
    an expert is aligned, fine-tuned and asked in one go; connectors that are realigned and
    modalities that are asked go out side by side.
    """
    travels = {
        job.name: job.arguments["step"]
        for job in jobs
        if job.name in recipes and job.arguments["step"].kind not in HERE
    }
    chains = _chains(jobs, travels, recipes)
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
            kind = "here" if job.name in recipes else job.shared
            found.append(Job(job.name, job.task, job.arguments, outside, job.weight, kind))
            continue
        first = travels[chain[0]]
        before = _for_features(first, recipes[chain[0]], place, data) if _goes_alone(first) else []
        found += before
        outside += tuple(each.name for each in before)
        weight = sum(by_name[name].weight for name in chain)
        sent = Chain(tuple(travels[name] for name in chain))
        arguments = _arguments(sent, recipes[chain[0]], place, data)
        found.append(Job(chain[0], on_a_worker, arguments, outside, weight))
    return found


def _arguments(chain: Chain, recipe: Recipe, place: Place, data: DataVersion) -> Mapping[str, Any]:
    return {
        "chain": chain,
        "recipe": recipe.model_dump(mode="json"),
        "common": recipe.common().model_dump(mode="json"),
        "data_files": {name: dict(files) for name, files in data.files.items()},
        "place": place,
    }


def _for_features(step: Step, recipe: Recipe, place: Place, data: DataVersion) -> list[Job]:
    """What comes before a modality's features: its rows reach the store, shares are encoded."""
    rows = Job(
        (step.reference, "rows"), publish_rows, {"step": step, "place": place}, (), 1.0, "here"
    )
    count = place.machine.feature_shares
    shares = [
        Job(
            (step.reference, number),
            on_a_worker,
            _arguments(Chain((step,), number), recipe, place, data),
            (rows.name,),
            WEIGHTS["features"] / count,
        )
        for number in range(1, count + 1)
    ]
    return [rows, *(shares if count > 1 else [])]


def _goes_alone(step: Step) -> bool:
    """Whether nothing travels with a step: its shares go out before it."""
    return step.kind == "features"


def _chains(
    jobs: Sequence[Job], travels: Mapping[Hashable, Step], recipes: Mapping[Hashable, Recipe]
) -> list[list[Hashable]]:
    needs = {
        job.name: {n for n in job.needs if n in travels} for job in jobs if job.name in travels
    }
    followers = Counter(name for each in needs.values() for name in each)
    chain_of: dict[Hashable, list[Hashable]] = {}
    for name, before in needs.items():
        chain: list[Hashable] = []
        for other in before:
            known = {n for member in chain_of[other] for n in (member, *needs[member])}
            single = followers[other] == 1 and not _goes_alone(travels[other])
            if single and before <= known and recipes[other] is recipes[name]:
                chain = chain_of[other]
        chain.append(name)
        chain_of[name] = chain
    return list({id(chain): chain for chain in chain_of.values()}.values())
