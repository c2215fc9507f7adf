"""What a comparison will cost, said before it starts: from its plans and the artifact store.

How long a step takes is what `graftline.planning.history` knows of such steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftline.planning.comparison import Comparison, WantedRun, prefix_stages
from graftline.planning.costs import lineage, model_parts
from graftline.planning.history import History, history_of, spoken
from graftline.planning.plan import Reference, Step
from graftline.planning.run import RunPlan, plan_run
from graftline.recipe import ExecutionSettings
from graftline.settings.reading import load_recipe
from graftline.store import Store


@dataclass(frozen=True)
class Budget:
    """What is there and what must be computed.

    Attributes:
        runs: how many runs are compared.
        prefix_tree: stages of one method and seed over all orders, those that begin alike once.
        without_tree: the same, each order for itself.
        stages: distinct stages of all runs, and how many of them are cached.
        steps: distinct steps, and how many of them are cached.
        missing: kind -> steps that must run.
        seconds: about how long they take, without those of `untimed` kinds.
        untimed: kinds of which the store has no history.
        slots: how many steps run at once.
    """

    runs: int
    prefix_tree: int
    without_tree: int
    stages: tuple[int, int]
    steps: tuple[int, int]
    missing: Mapping[str, int]
    seconds: float
    untimed: tuple[str, ...]
    slots: int

    def text(self) -> str:
        """The budget in a few lines."""
        (stages, stages_cached), (steps, steps_cached) = self.stages, self.steps
        tree = f"{self.prefix_tree} stages"
        if self.prefix_tree < self.without_tree:
            tree += f", not {self.without_tree}: what begins alike is computed once"
        lines = [
            f"{self.runs} runs; prefix tree of the orders, for one method and seed: {tree}",
            f"stages: {stages_cached} of {stages} are cached, {stages - stages_cached} must run",
            f"steps: {steps_cached} of {steps} are cached, {steps - steps_cached} must run",
        ]
        if self.missing:
            lines[-1] += f" ({', '.join(f'{n} {kind}' for kind, n in self.missing.items())})"
        if self.missing and len(self.untimed) == len(self.missing):
            lines.append("time: unknown, no such step is in the store yet")
        elif self.missing:
            about = f"time: about {spoken(self.seconds)} in {self.slots} slot(s)"
            if self.untimed:
                about += f", without {', '.join(self.untimed)}, which the store has no history of"
            lines.append(about)
        return "\n".join(lines)


def plans_of(
    recipe_path: Path | str,
    wanted: Comparison,
    overrides: Mapping[str, Any],
    files: Mapping[str, Mapping[str, str]],
) -> list[tuple[WantedRun, RunPlan]]:
    """Every run of a comparison with its plan.

    Args:
        recipe_path: the recipe's file.
        wanted: the runs.
        overrides: dotted key -> value, for all runs.
        files: modality -> split -> md5 of its parquet file.

    Raises:
        RecipeError: the recipe cannot be run so.
    """
    return [
        (run, plan_run(load_recipe(recipe_path, run.changes(overrides)), files))
        for run in wanted.runs()
    ]


def budget_of(plans: Sequence[RunPlan], store: Store) -> Budget:
    """Compares the plans of a comparison's runs with the store; computes nothing.

    Args:
        plans: a plan a run.
        store: where artifacts lie.
    """
    steps = {reference: step for plan in plans for reference, step in plan.steps.items()}
    done = {r for r, step in steps.items() if store.holds(step.kind, r.fingerprint)}
    missing: dict[str, list[Step]] = {}
    for reference, step in steps.items():
        if reference not in done:
            missing.setdefault(step.kind, []).append(step)
    stages = _stages(plans)
    orders = list(dict.fromkeys(plan.recipe.order for plan in plans))
    execution = plans[0].recipe.execution
    # a store may hold thousands of steps, which nobody asks where nothing is missing
    history = history_of(steps.values(), store) if missing else History({}, {})
    seconds, untimed = _seconds(missing, history, execution)
    return Budget(
        runs=len(plans),
        prefix_tree=prefix_stages(orders),
        without_tree=sum(map(len, orders)),
        stages=(len(stages), sum(needed <= done for needed in stages.values())),
        steps=(len(steps), len(done)),
        missing={kind: len(each) for kind, each in missing.items()},
        seconds=seconds,
        untimed=untimed,
        slots=execution.slots,
    )


def _stages(plans: Iterable[RunPlan]) -> dict[frozenset[Reference], frozenset[Reference]]:
    """Distinct stages by the parts of their final model -> what the model comes from."""
    found: dict[frozenset[Reference], frozenset[Reference]] = {}
    for plan in plans:
        for stage in plan.stages:
            parts = frozenset(
                part for role in model_parts(plan, stage.index).values() for part in role
            )
            if parts not in found:
                found[parts] = frozenset(lineage(plan, stage.index))
    return found


def _seconds(
    missing: Mapping[str, Sequence[Step]], history: History, execution: ExecutionSettings
) -> tuple[float, tuple[str, ...]]:
    """Seconds in the slots, and the kinds that nothing is known of."""
    expected = {kind: [history.expected(step) for step in each] for kind, each in missing.items()}
    untimed = tuple(kind for kind, each in expected.items() if None in each)
    alone = {kind: sum(seconds or 0.0 for seconds in each) for kind, each in expected.items()}
    tuning = sum(seconds for kind, seconds in alone.items() if kind.endswith("fine-tune"))
    at_once = min(execution.slots, execution.fine_tunings)
    return max(sum(alone.values()) / execution.slots, tuning / at_once), untimed
