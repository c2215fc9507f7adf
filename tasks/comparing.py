"""What is read of a comparison: its tables, page and pictures; and the same numbers in MLflow."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from graftline.durable import atomic_write_text
from graftline.errors import GraftlineError
from graftline.evaluation.bootstrap import Interval
from graftline.evaluation.comparison import ComparedMethod, Order, compare_runs
from graftline.evaluation.comparison_page import page
from graftline.evaluation.comparison_pictures import (
    frontier_panel,
    order_panels,
    save_panels,
    stage_panels,
)
from graftline.evaluation.comparison_table import TimeSpent, comparison_csv, markdown
from graftline.evaluation.report import RunScores, read_report
from graftline.planning.comparison import WantedRun
from graftline.planning.costs import seconds_by_activity
from graftline.planning.plan import Reference, is_done
from graftline.planning.run import RunPlan
from graftline.stores import open_store
from tasks import tracking
from tasks.outputs import comparison_files, read_metrics, report_folder, reports_also
from tasks.references import DataVersion, TrackedRun
from tasks.report import has_costs, metrics_in

_NUMBERS = {"brg": "BRG.final", "frg_mean": "FRG.mean", "text_perplexity": "text_perplexity_after"}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Compared:
    """What is compared.

    Attributes:
        recipe: the recipe's name.
        methods: as `compare_runs` returns them.
        baseline: label of the method that differences are taken from.
        data_md5: the data's version.
        identity: of the runs: the same runs have the same.
    """

    recipe: str
    methods: tuple[ComparedMethod, ...]
    baseline: str | None
    data_md5: str
    identity: str


def is_reported(plan: RunPlan, folder: Path) -> bool:
    """Whether a run's report is of this very result, wherever its artifacts are.

    Costs that reports of earlier versions do not hold are shown as missing, and no reason to
    train again.

    Args:
        plan: the run.
        folder: its report.
    """
    same = metrics_in(folder).get("fingerprint") == plan.fingerprint
    return same and (folder / "examples.csv").exists()


def reported_runs(
    plans: Sequence[tuple[WantedRun, RunPlan]], usual: Sequence[str]
) -> set[WantedRun]:
    """Those of a comparison's runs that are reported.

    Args:
        plans: every run with its plan.
        usual: the order that the recipe's file names.
    """
    return {run for run, plan in plans if is_reported(plan, report_folder(plan.recipe, usual))}


def is_finished(plan: RunPlan, folder: Path, done: set[Reference]) -> bool:
    """Whether a run is reported in full and its steps are in the store.

    Args:
        plan: the run.
        folder: its report.
        done: steps that were found earlier, which are not looked at again; gets what is found.
    """
    metrics = metrics_in(folder)
    if not (is_reported(plan, folder) and has_costs(metrics) and metrics.get("step_seconds")):
        return False
    store = open_store(plan.recipe.store, verify="quick")
    done |= {r for r, step in plan.steps.items() if r not in done and is_done(step, store)}
    return done >= plan.steps.keys()


def reports_of(name: str, places: Sequence[tuple[Order, int]]) -> dict[str, list[Path]]:
    """Label -> report folders of another recipe's methods that have all runs of a comparison.

    Args:
        name: the other recipe's name.
        places: (order, seed) of every run.

    Raises:
        GraftlineError: no method of it has them all, or a report is damaged.
    """
    found: dict[str, dict[tuple[Order, int], Path]] = {}
    for folder in reports_also(name):
        metrics = read_metrics(folder)
        runs = found.setdefault(f"{metrics['method']} ({name})", {})
        runs[tuple(metrics["order"]), int(metrics["seed"])] = folder
    whole = {
        label: [runs[place] for place in places]
        for label, runs in found.items()
        if runs.keys() >= set(places)
    }
    if not whole:
        wanted = "; ".join(f"{' '.join(order)} seed {seed}" for order, seed in places)
        raise GraftlineError(
            f"--also {name}: no method under reports/{name} has all of these runs: {wanted}"
        )
    return whole


def require_same_data(
    others: Mapping[str, Sequence[Path]], data: DataVersion, own: Sequence[Path]
) -> None:
    """Raises a GraftlineError if reports are of other data than the runs that they come beside.

    Args:
        others: label -> report folders of another recipe's method.
        data: what runs see now.
        own: the runs' reports; those that are there may be of data before.
    """
    known = {data.md5, *(metrics_in(folder).get("data_md5") for folder in own)}
    for folder in (folder for each in others.values() for folder in each):
        found = read_metrics(folder).get("data_md5")
        if found not in known:
            raise GraftlineError(
                f"{folder}: its run saw other data ({found}) than {data.folder} holds "
                f"({data.md5}); leave it out of --also, or run it again on the same"
            )


def _time_spent(runs: Sequence[RunScores]) -> TimeSpent:
    """What runs' time went into; nothing where an older report does not say it."""
    by_step = [run.step_seconds for run in runs]
    whole = [each for each in by_step if each is not None]
    computing = seconds_by_activity(whole) if len(whole) == len(by_step) else {}
    waited = [run for run in runs if run.idle_seconds is not None]
    idle = sum(run.idle_seconds or 0.0 for run in waited)
    return TimeSpent(computing, sum(run.wall_seconds for run in waited), idle)


@task(name="write-comparison", cache_policy=NO_CACHE, persist_result=False)
def write_comparison(
    recipe: str,
    groups: Mapping[str, Sequence[Path]],
    baseline: str | None,
    folder: Path,
) -> Compared:
    """Writes a comparison's tables, page and pictures.

    A picture that only an earlier comparison had goes.

    Args:
        recipe: the recipe's name.
        groups: label -> the reports of the method's runs.
        baseline: label of the method that differences are taken from.
        folder: where to write.
    """
    runs = {label: [read_report(path) for path in paths] for label, paths in groups.items()}
    methods = compare_runs(runs, baseline)
    time = _time_spent([run for each in runs.values() for run in each])
    first = next(iter(runs.values()))[0]
    folder.mkdir(parents=True, exist_ok=True)
    save_panels(
        folder / "stages.png", stage_panels(methods), f"{recipe}: scores over stages",
        "Means over seeds in the first order; thin bars: lowest to highest seed.",
    )  # fmt: skip
    frontier = frontier_panel(methods)
    for name, panels, title, note in (
        ("frontier.png", [frontier] if frontier else [], "BRG against FRG",
         "95 % intervals. Up and to the right is better."),
        ("orders.png", order_panels(methods), "forgetting by order",
         "95 % intervals. At 100 nothing is forgotten."),
    ):  # fmt: skip
        if panels:
            save_panels(folder / name, panels, f"{recipe}: {title}", note)
        else:
            (folder / name).unlink(missing_ok=True)
    atomic_write_text(folder / "table.csv", comparison_csv(methods, baseline))
    atomic_write_text(folder / "table.md", markdown(methods, baseline, time))
    text = page(recipe, methods, baseline, time, first.data_md5)
    atomic_write_text(folder / "page.html", text)
    names = sorted(f"{label} {run.fingerprint}" for label, each in runs.items() for run in each)
    identity = sha256("\n".join(names).encode()).hexdigest()
    return Compared(recipe, tuple(methods), baseline, first.data_md5, identity)


@task(name="record-comparison", cache_policy=NO_CACHE, persist_result=False)
def record_comparison(compared: Compared, tracked: TrackedRun, folder: Path) -> None:
    """Logs a comparison to MLflow: a child run a method, with curves over stages; the files."""
    for method in compared.methods:
        tags = {"method": method.method, "rank": str(method.rank or ""), **_tags(compared, method)}
        child = tracking.method_run(tracked, f"{method.label} over {method.runs} run(s)", tags)
        for stage, numbers in _curves(method).items():
            tracking.log_numbers(child, tracked.uri, numbers, stage)
        tracking.log_numbers(child, tracked.uri, _totals(method), len(method.orders[0]))
        tracking.end_run(tracked.uri, child, "FINISHED")
    tracking.log_files(tracked, comparison_files(folder))


def comparison_tags(compared: Compared) -> dict[str, str]:
    """The tags of a comparison's run in MLflow."""
    methods = ",".join(method.label for method in compared.methods)
    return {
        "comparison": compared.identity,
        "methods": methods,
        **_tags(compared, compared.methods[0]),
    }


def _tags(compared: Compared, method: ComparedMethod) -> dict[str, str]:
    return {
        "seeds": ",".join(map(str, method.seeds)),
        "orders": "; ".join(",".join(order) for order in method.orders),
        "n": str(method.n),
        "data_md5": compared.data_md5,
    }


def _curves(method: ComparedMethod) -> dict[int, dict[str, float]]:
    """Stage -> name -> number, named as in the runs of `continual`."""
    found: dict[int, dict[str, float]] = {
        stage: {f"score.{name}": mean for name, (mean, _, _) in scores.items()}
        for stage, scores in method.stages.items()
    }
    for stage, brg in method.brg_per_stage.items():
        found.setdefault(stage, {})["BRG"] = brg
    return found


def _totals(method: ComparedMethod) -> dict[str, float]:
    """Every number of the method's row with both ends of its interval."""
    numbers: dict[str, float | None] = dict(method.costs)
    named = {_NUMBERS.get(name, name): each for name, each in method.intervals.items()}
    named |= {
        f"{_NUMBERS.get(name, name)}.difference": each for name, each in method.differences.items()
    }
    for name, each in named.items():
        numbers |= _with_ends(name, each)
    return {name: float(value) for name, value in numbers.items() if value is not None}


def _with_ends(name: str, each: Interval) -> dict[str, float | None]:
    return {name: each.estimate, f"{name}.low": each.low, f"{name}.high": each.high}
