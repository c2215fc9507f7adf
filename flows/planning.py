"""`graftline plan`: what a run will do and what it will cost, before anything starts."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from graftline.durable import nearest
from graftline.errors import GraftlineError
from graftline.manifest import CorruptArtifact
from graftline.planning.forecast import Forecast, estimate_row_tokens, forecast
from graftline.planning.history import spoken
from graftline.planning.problems import NOT_BUILT, files_to_come, recipe_problems
from graftline.planning.run import RunPlan, plan_run
from graftline.recipe import Recipe
from graftline.store import Store
from graftline.stores import open_store
from tasks.data import is_filled, why_not_built
from tasks.outputs import report_folder
from tasks.own_data import in_folder, known_data
from tasks.preflight import bytes_needed, check_disk, check_folders
from tasks.steps import by_stage

TYPICAL_ROW_TOKENS = 32.0
"""Of a training row, where the rows are not there to be measured."""


@dataclass(frozen=True)
class Prospect:
    """What is known of a run before it starts.

    Attributes:
        recipe: the recipe.
        problems: what would stop it, a line each; the rest is None if no plan can be made.
        data: md5 of the data, or `NOT_BUILT`.
        plan: the plan.
        costs: what its steps will cost.
        disk_bytes: what its unfinished steps will write.
        disk_free: bytes that are free where the store lies.
    """

    recipe: Recipe
    problems: tuple[str, ...]
    data: str
    plan: RunPlan | None = None
    costs: Forecast | None = None
    disk_bytes: int = 0
    disk_free: int = 0


def look_ahead(recipe: Recipe, usual: Sequence[str]) -> Prospect:
    """Plans a run and estimates its cost; starts nothing and writes nothing that stays.

    But for the hashes of own media, which the store remembers.

    Args:
        recipe: the recipe.
        usual: the order that its file names.

    Raises:
        GraftlineError: the recipe cannot be planned, for a reason that is no problem of its own.
    """
    version, complaints = known_data(recipe)
    known = version.files if version else {}
    data = version.md5 if version and all(name in known for name in recipe.order) else NOT_BUILT
    files = {**files_to_come(recipe), **known}
    built = is_filled(Path(recipe.data.folder))
    report = report_folder(recipe, usual)
    problems = [*complaints, *recipe_problems(recipe, known if built else files)]
    wanted = in_folder(recipe)
    missing = why_not_built(recipe.data.folder, wanted) if wanted else None
    problems += [missing] if missing else []
    problems += _complaints(lambda: check_folders(recipe, report))
    store = open_store(recipe.store, verify="quick")
    try:
        plan = plan_run(recipe, files)
    except GraftlineError:
        if not problems:
            raise
        return Prospect(recipe, tuple(problems), data)
    damaged = _damaged(plan, store)
    if damaged:
        return Prospect(recipe, (*problems, *damaged), data, plan)
    measured = {
        name: estimate_row_tokens(recipe, name, _imported(plan, store, name))
        for name in recipe.order
    }
    assumed = recipe.estimate.row_tokens
    tokens = {m: found or assumed.get(m, TYPICAL_ROW_TOKENS) for m, found in measured.items()}
    costs = forecast(recipe, by_stage(plan), store, tokens)
    problems += _complaints(lambda: check_disk(plan, store))
    free = shutil.disk_usage(nearest(store.root)).free
    return Prospect(recipe, tuple(problems), data, plan, costs, bytes_needed(plan, store), free)


def _imported(plan: RunPlan, store: Store, modality: str) -> Path | None:
    """Where a modality's imported rows lie, or would lie; None where they were not imported."""
    for step in plan.steps.values():
        if step.kind == "features" and step.parameters["modality"] == modality:
            rows = step.parents.get("rows")
            return None if rows is None else store.folder(rows.kind, rows.fingerprint)
    return None


def _complaints(check: Callable[[], None]) -> list[str]:
    try:
        check()
    except GraftlineError as error:
        return str(error).splitlines()
    return []


def _damaged(plan: RunPlan, store: Store) -> list[str]:
    """What is wrong with artifacts that the run would reuse."""
    problems = []
    for step in plan.steps.values():
        try:
            store.holds(step.kind, step.reference.fingerprint)
        except CorruptArtifact as error:
            problems.append(str(error))
    return problems


def as_json(prospect: Prospect) -> dict[str, Any]:
    """Everything that the table says, and each step, as plain data."""
    recipe, costs = prospect.recipe, prospect.costs
    content: dict[str, Any] = {
        "recipe": recipe.name,
        "method": recipe.method,
        "seed": recipe.seed,
        "order": list(recipe.order),
        "data_md5": prospect.data,
        "problems": list(prospect.problems),
    }
    if prospect.plan is None or costs is None:
        return content
    return content | {
        "fingerprint": prospect.plan.fingerprint,
        "steps": [
            {
                "stage": each.group,
                "kind": each.step.kind,
                "label": each.step.label,
                "fingerprint": each.step.reference.fingerprint,
                "cached": each.cached,
                "seconds": each.seconds,
                "training_flops": each.flops,
                "memory_bytes": each.memory_bytes,
            }
            for each in costs.steps
        ],
        "cached": len(costs.steps) - len(costs.to_run),
        "to_run": len(costs.to_run),
        "seconds": costs.seconds,
        "kinds_without_history": costs.kinds_without_history,
        "disk_bytes": prospect.disk_bytes,
        "disk_free_bytes": prospect.disk_free,
        "training_flops": costs.training_flops,
        "inference_flops": costs.inference_flops,
        "gpu_hours": costs.gpu_hours(recipe.estimate.teraflops),
        "memory_bytes": costs.memory_bytes,
        "backbone_parameters": costs.parameters,
        "tokens_a_row": dict(costs.row_tokens),
    }


def step_lines(prospect: Prospect) -> list[str]:
    """Every step under its stage: kind, label, cached or about how long."""
    if prospect.costs is None:
        return []
    lines = []
    groups = dict.fromkeys(each.group for each in prospect.costs.steps)
    for group in groups:
        lines.append(f"stage {group}" if group else "beside the stages: base, experts, text")
        for each in prospect.costs.steps:
            if each.group == group:
                state = "cached" if each.cached else f"to run, {_seconds(each.seconds)}"
                lines.append(f"  {each.step.kind:<14} {each.step.label:<34} {state}")
    return lines


def cost_table(prospect: Prospect) -> Table:
    """What a run will cost, in one table."""
    recipe, costs = prospect.recipe, prospect.costs
    title = f"{recipe.name} · {recipe.method} · seed {recipe.seed}: before it starts"
    table = Table(title=title, title_justify="left")
    for heading in ("", "about", "how this is known"):
        table.add_column(heading)
    if costs is None:
        return table
    todo = Counter(each.step.kind for each in costs.to_run)
    kinds = ", ".join(f"{count} {kind}" for kind, count in todo.items())
    steps = f"{len(costs.to_run)} to run, {len(costs.steps) - len(costs.to_run)} cached"
    table.add_row("steps", steps, kinds or "everything is there")
    table.add_row("computing", *_time(costs, recipe.execution.slots))
    room = f"{_bytes(prospect.disk_free)} are free there"
    table.add_row("disk", _bytes(prospect.disk_bytes), f"written to {recipe.store}; {room}")
    table.add_row("training", _flops(costs.training_flops), _flops_source(prospect))
    if costs.inference_flops:
        longest = recipe.evaluation.max_new_tokens
        source = f"encoding and answering, 2 N tokens, {longest} an answer; what is known of it"
        table.add_row("inference", _flops(costs.inference_flops), source)
    hours = costs.gpu_hours(recipe.estimate.teraflops)
    if hours is not None:
        rate = f"training and inference at {recipe.estimate.teraflops:g} TFLOP/s"
        rate += ", which the recipe assumes"
        table.add_row("GPU hours", f"{hours:.3g}", rate)
    memory = "of the largest step: weights, gradients, fp32 master, two moments; no activations"
    table.add_row("memory", _bytes(costs.memory_bytes), memory)
    data = prospect.data if prospect.data == NOT_BUILT else prospect.data[:12]
    table.add_row("data", data, recipe.data.folder)
    return table


def _time(costs: Forecast, slots: int) -> tuple[str, str]:
    unknown = costs.kinds_without_history
    source = "median of such steps, or of their kind, of the same LLM in this store"
    if slots > 1:
        source += f"; one after another, and {slots} may run side by side"
    if not unknown:
        return _seconds(costs.seconds), source
    if costs.seconds == 0:
        return "unknown", f"no history in this store of: {', '.join(unknown)}"
    return f"more than {_seconds(costs.seconds)}", f"{source}; no history of: {', '.join(unknown)}"


def _flops_source(prospect: Prospect) -> str:
    costs = prospect.costs
    if costs is None or costs.parameters is None:
        return "the backbone's size is not known before it is fetched"
    lengths = ", ".join(f"{name} {count:.0f}" for name, count in costs.row_tokens.items())
    where = "assumed, no rows yet" if prospect.data == NOT_BUILT else "from the rows"
    return (
        f"6 N tokens fine-tuning, 4 N where the backbone is frozen; N = {costs.parameters:,}; "
        f"tokens a row ({where}): {lengths}"
    )


def _seconds(seconds: float | None) -> str:
    return "unknown" if seconds is None else spoken(seconds, 1)


def _bytes(count: int | None) -> str:
    return "unknown" if count is None else _scaled(float(count), "B", ("", "k", "M", "G", "T"))


def _flops(count: float | None) -> str:
    prefixes = ("", "k", "M", "G", "T", "P", "E", "Z")
    return "unknown" if count is None else _scaled(count, "FLOP", prefixes)


def _scaled(value: float, unit: str, prefixes: Sequence[str]) -> str:
    power = 0 if value < 1 else min(len(prefixes) - 1, int(math.log10(value) // 3))
    return f"{value / 1000**power:.3g} {prefixes[power]}{unit}"
