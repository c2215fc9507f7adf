"""The report of a run: `metrics.json`, `scores.csv`, `examples.csv`, and tables over seeds.

`metrics.json` holds numbers in the units of their definitions: gains in per cent, scores from 0
to 1, `wall_seconds` and `computing_seconds` in seconds, `peak_rss_bytes` in bytes. It is strict
JSON: what is undefined is `null`, and `undefined` says why.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from graftline.durable import atomic_write_text
from graftline.evaluation import EvaluationError
from graftline.evaluation.bootstrap import Cell, Interval, intervals
from graftline.evaluation.cells import JOINT, Place, ScoreCell, cells_in, csv_text, examples_csv
from graftline.evaluation.gains import Gains, all_gains

CSV_COLUMNS = ("stage", "stage_modality", "modality", "task", "point", "metric", "score", "n")
EXAMPLES = "examples.csv"
HEADLINE = "headline.json"
HEADLINES = ("brg", "brg_mean", "frg_mean", "retention")
COSTS = (
    "trained_parameters",
    "stored_bytes_per_modality",
    "carried_bytes",
    "replay_rows",
    "training_seconds",
    "evaluating_seconds",
    "idle_seconds",
)
"""What reports of earlier versions may lack: metrics and fields of `RunScores`."""
_NAMED = ("recipe", "method", "seed")
_MEASURED = (
    "text_perplexity_before",
    "text_perplexity_after",
    "wall_seconds",
    "computing_seconds",
    "merging_seconds",
    "storage_bits",
    *COSTS,
    "peak_rss_bytes",
    "data_md5",
    "fingerprint",
)
"""Metrics that are fields of `RunScores`, as they are."""


@dataclass(frozen=True)
class RunScores:
    """Everything that the report of one run needs.

    Attributes:
        recipe: Name of the recipe.
        method: Name of the method.
        seed: Seed of the run.
        order: The modality of each stage.
        cells: Scores; at least those of the last stage's `final` model on every modality.
        wall_seconds: Duration of the run.
        computing_seconds: What its steps took, by whichever run they were computed.
        merging_seconds: What its merges and compositions took of that.
        peak_rss_bytes: Peak resident memory.
        data_md5: The version of the data.
        fingerprint: Of the run's plan: it changes whenever one of its scores may change.
        text_perplexity_before: Perplexity of the held-out text under the untouched base.
        text_perplexity_after: The same under the last model.
        storage_bits: What the last model's backbones take, in bits a parameter of one backbone.
        trained_parameters: The most weights that one training step changed.
        stored_bytes_per_modality: What answering needs beyond one backbone, by modality.
        carried_bytes: What learning the last modality read of earlier stages beside their model.
        replay_rows: Training rows of all modalities that were kept for later stages.
        training_seconds: What the training of the last model took, all stages together.
        evaluating_seconds: What all evaluations took.
        idle_seconds: Part of `wall_seconds` in which no step computed: data, records, waiting.
        step_seconds: What each of its steps took, by `<kind>/<fingerprint>`; runs share steps.
        settings: Fingerprint of the same run with seed 0; the same where only the seed differs.
    """

    recipe: str
    method: str
    seed: int
    order: tuple[str, ...]
    cells: tuple[ScoreCell, ...]
    wall_seconds: float
    computing_seconds: float
    merging_seconds: float
    peak_rss_bytes: int
    data_md5: str
    fingerprint: str
    text_perplexity_before: float | None = None
    text_perplexity_after: float | None = None
    storage_bits: float | None = None
    trained_parameters: int | None = None
    stored_bytes_per_modality: float | None = None
    carried_bytes: float | None = None
    replay_rows: int | None = None
    training_seconds: float | None = None
    evaluating_seconds: float | None = None
    idle_seconds: float | None = None
    step_seconds: Mapping[str, float] | None = None
    settings: str | None = None

    def __post_init__(self) -> None:
        seen: set[tuple[Place, str]] = set()
        for cell in self.cells:
            if cell.modality not in (*self.order, JOINT):
                raise EvaluationError(f"modality {cell.modality!r} is not in {list(self.order)}")
            if (cell.place, cell.task) in seen:
                raise EvaluationError(f"{cell.place} on task {cell.task!r} was scored twice")
            seen.add((cell.place, cell.task))


def check_same_settings(name: str, runs: Sequence[RunScores]) -> None:
    """Runs whose mean is taken differ by seed and order alone, as far as their reports tell.

    Raises:
        EvaluationError: recipes, data or code were different.
    """
    for order in {run.order for run in runs}:
        known = [run for run in runs if run.order == order and run.settings is not None]
        if len({run.settings for run in known}) > 1:
            seeds = ", ".join(str(run.seed) for run in known)
            raise EvaluationError(
                f"{name}: its runs (seeds {seeds}) were made with different settings, data or "
                "code, so no mean is taken of them; run them again with the same, or what is to "
                "stand beside them under a name of its own (--set name=...)"
            )


def bootstrap_cells(run: RunScores) -> dict[Place, Cell]:
    """The run's cells as the bootstrap takes them, by (point, stage, modality)."""
    tasks: dict[Place, dict[str, tuple[float, ...]]] = {}
    for cell in run.cells:
        tasks.setdefault(cell.place, {})[cell.task] = cell.examples
    return {place: Cell(place[2], by_task) for place, by_task in tasks.items()}


def place_scores(run: RunScores) -> dict[Place, float]:
    """Score of each (point, stage, modality): the mean over tasks of the task means."""
    tasks: dict[Place, list[float]] = {}
    for cell in run.cells:
        tasks.setdefault(cell.place, []).append(cell.score)
    return {place: math.fsum(scores) / len(scores) for place, scores in tasks.items()}


def split_scores(
    scores: Mapping[Place, float], order: Sequence[str]
) -> tuple[dict[int, dict[str, float]], dict[str, float] | None, dict[str, float] | None]:
    """`S[i][m]`, `V[m]` and `E[m]` out of scores by place; `None` where none were scored."""
    stages: dict[int, dict[str, float]] = {}
    vanilla: dict[str, float] = {}
    experts: dict[str, float] = {}
    for (point, stage, modality), score in scores.items():
        if point == "final":
            stages.setdefault(stage, {})[modality] = score
        elif point == "vanilla" and 1 <= stage <= len(order) and order[stage - 1] == modality:
            vanilla[modality] = score
        elif point == "expert":
            experts[modality] = score
    return stages, vanilla or None, experts or None


def gains_of(scores: Mapping[Place, float], order: Sequence[str]) -> Gains:
    """Every gain of a run from its scores by place; see `graftline.evaluation.gains`."""
    stages, vanilla, experts = split_scores(scores, order)
    return all_gains(stages, order, vanilla=vanilla, experts=experts)


def mean_of_all(values: Sequence[float | None]) -> float | None:
    """The mean of a number over runs; None where one of them lacks it."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if len(known) == len(values) else None


def run_intervals(
    cells_per_seed: Sequence[Mapping[Place, Cell]],
    order: Sequence[str],
    replicates: int = 2000,
) -> dict[str, Interval]:
    """95 % intervals of what a report says of a run, or of several that differ by seed.

    That is the headlines, each modality's final score (`scores.<modality>`), and joint questions
    where they were asked (`joint`).

    Args:
        cells_per_seed: From `bootstrap_cells`, of each run.
        order: The modality of each stage.
        replicates: Bootstrap replicates.

    Raises:
        EvaluationError: The runs' cells do not match, or a score that a gain needs is missing.
    """
    last = len(order)
    place: Place = ("final", last, JOINT)

    def statistics(scores: Mapping[Place, float]) -> dict[str, float | None]:
        gains = gains_of(scores, order)
        named: dict[str, float | None] = {k: getattr(gains, k).value for k in HEADLINES}
        named.update({f"scores.{m}": scores[("final", last, m)] for m in order})
        return named

    own = [{at: cell for at, cell in cells.items() if at != place} for cells in cells_per_seed]
    found = intervals(own, statistics, replicates)
    joint = [{place: cells[place]} for cells in cells_per_seed if place in cells]
    if len(joint) == len(cells_per_seed):
        found |= intervals(joint, lambda scores: {JOINT: scores[place]}, replicates)
    return found


def metrics_of(run: RunScores, replicates: int = 2000) -> dict[str, Any]:
    """The content of `metrics.json`; plain JSON types, no NaN or infinity.

    Args:
        run: The run.
        replicates: Bootstrap replicates of the intervals.

    Returns:
        The metrics. `frg` equals `frg_mean` (the headline); per-stage keys are stage numbers.

    Raises:
        EvaluationError: A score that a gain needs is missing.
    """
    scores = place_scores(run)
    stages, vanilla, experts = split_scores(scores, run.order)
    last = len(run.order)
    missing = [m for m in run.order if m not in stages.get(last, {})]
    if missing:
        raise EvaluationError(f"no final score after stage {last} of {', '.join(missing)}")
    found = run_intervals([bootstrap_cells(run)], run.order, replicates)
    final = [c for c in run.cells if c.point == "final" and c.stage == last]
    diagonal = {m: stages.get(i, {}).get(m) for i, m in enumerate(run.order, start=1)}
    return {
        "recipe": run.recipe,
        "method": run.method,
        "seed": run.seed,
        "order": list(run.order),
        "n": {m: sum(c.n for c in final if c.modality == m) for m in run.order},
        **_gain_metrics(gains_of(scores, run.order)),
        "intervals": {name: asdict(each) for name, each in found.items()},
        "scores": {m: stages[last][m] for m in run.order},
        JOINT: stages[last].get(JOINT),
        "scores_when_learned": diagonal,
        "scores_vanilla": vanilla,
        "scores_expert": experts,
        "scores_per_task": {
            m: {c.task: _task_score(c) for c in final if c.modality == m} for m in stages[last]
        },
        **{name: getattr(run, name) for name in _MEASURED},
        "step_seconds": None if run.step_seconds is None else dict(run.step_seconds),
        "settings": run.settings,
    }


def _gain_metrics(gains: Gains) -> dict[str, Any]:
    named = {
        **{key: getattr(gains, key) for key in HEADLINES},
        **{f"brg_per_stage.{i}": gain for i, gain in gains.brg_per_stage.items()},
        **{f"frg_per_stage.{i}": gain for i, gain in gains.frg_per_stage.items()},
    }
    return {
        "brg": gains.brg.value,
        "brg_mean": gains.brg_mean.value,
        "brg_per_stage": {str(i): gain.value for i, gain in gains.brg_per_stage.items()},
        "frg": gains.frg_mean.value,
        "frg_mean": gains.frg_mean.value,
        "frg_per_stage": {str(i): gain.value for i, gain in gains.frg_per_stage.items()},
        "retention": gains.retention.value,
        "undefined": {k: gain.reason for k, gain in named.items() if gain.value is None},
    }


def headline_of(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `headline.json`: few numbers; `dvc metrics show` makes a column of each."""
    chosen = {name: metrics[name] for name in ("brg", "frg", "retention", JOINT, "scores")}
    return {**chosen, "perplexity": metrics["text_perplexity_after"]}


def scores_csv(run: RunScores) -> str:
    """The content of `scores.csv`: a row a cell, the columns of `CSV_COLUMNS`."""
    rows = [[getattr(cell, column) for column in CSV_COLUMNS] for cell in run.cells]
    return csv_text(CSV_COLUMNS, rows)


def write_report(folder: Path, run: RunScores, replicates: int = 2000) -> dict[str, Any]:
    """Write examples, scores, headline and metrics, each file atomically, metrics last.

    Args:
        folder: `reports/<recipe>/<method>/seed-<s>/`; made if absent.
        run: The run.
        replicates: Bootstrap replicates of the intervals.

    Returns:
        The metrics as written.

    Raises:
        EvaluationError: A needed score is missing, or a number is not finite.
        OSError: The folder cannot be written.
    """
    metrics = metrics_of(run, replicates)
    text = _strict_json(metrics, f"metrics of {run.method}, seed {run.seed}")
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(folder / EXAMPLES, examples_csv(run.cells))
    atomic_write_text(folder / "scores.csv", scores_csv(run))
    atomic_write_text(folder / HEADLINE, _strict_json(headline_of(metrics), HEADLINE))
    atomic_write_text(folder / "metrics.json", text)
    return metrics


def read_report(folder: Path) -> RunScores:
    """Read a run back from its report folder, exactly as it was written.

    Raises:
        EvaluationError: A file is absent or does not hold what `write_report` wrote.
    """
    try:
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        cells = cells_in((folder / EXAMPLES).read_text(encoding="utf-8"))
        scalars = {name: metrics[name] for name in (*_NAMED, *_MEASURED) if name not in COSTS}
        # older reports have none of these
        scalars |= {name: metrics.get(name) for name in (*COSTS, "step_seconds", "settings")}
        return RunScores(order=tuple(metrics["order"]), cells=cells, **scalars)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise EvaluationError(
            f"{folder} holds no readable report ({type(error).__name__}: {error}): "
            "run the recipe again to write metrics.json and examples.csv"
        ) from error


def _task_score(cell: ScoreCell) -> dict[str, Any]:
    return {"metric": cell.metric, "score": cell.score, "n": cell.n}


def _strict_json(content: object, name: str) -> str:
    try:
        return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError as error:
        raise EvaluationError(f"{name}: a number is NaN or infinite ({error})") from error
