"""What a run's model costs: weights trained, bytes and rows kept, seconds; from its artifacts.

A step counts by its kind: what is neither preparation, evaluation nor merging is training.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from pyarrow.parquet import read_metadata

from graftline.data.examples import ROWS, replay_rows
from graftline.evaluation.cells import JOINT
from graftline.manifest import read_manifest
from graftline.model.loading import read_record
from graftline.planning.history import TIMING, recorded_seconds
from graftline.planning.plan import Reference, Step
from graftline.planning.run import RunPlan
from graftline.store import Store
from graftline.weight_files import Entry, read_header

Activity = Literal["training", "evaluation", "merging", "preparation"]
_ACTIVITIES: dict[str, Activity] = {
    "backbone": "preparation",
    "bundle": "preparation",
    "features": "preparation",
    "rows": "preparation",
    "evaluate": "evaluation",
    "evaluate-joint": "evaluation",
    "perplexity": "evaluation",
    "merge": "merging",
    "compose": "merging",
    "adapters": "merging",
    "weighted-merge": "merging",
    "correct": "merging",
    "statistics": "preparation",
}
_Part = tuple[Reference, str]
"""An artifact, and how the names of those of its files begin that are meant."""
_CHUNK = 1 << 20  # numbers compared at once
_SHIFT = np.uint32(16)  # bfloat16 is the upper half of a float32


@dataclass(frozen=True)
class Costs:
    """What a run's last model cost and takes.

    Attributes:
        trained_parameters: The most weights that one training step of its lineage changed; with
            LoRA those of the low-rank factors.
        stored_bytes_per_modality: What answering needs beyond one backbone, by modality: the
            connector, and masks, adapters or further backbones where the method keeps them.
        carried_bytes: What learning the last modality read of earlier stages beside their model:
            features of kept rows, statistics, logits, Fisher information, older models. Answering
            needs none of it.
        replay_rows: Training rows of all modalities that are kept for later stages.
        training_seconds: What the training steps of its lineage took when they were computed.
        evaluating_seconds: What all evaluations of the run took.
    """

    trained_parameters: int
    stored_bytes_per_modality: float
    carried_bytes: float
    replay_rows: int
    training_seconds: float
    evaluating_seconds: float


def costs_of(plan: RunPlan, store: Store) -> Costs:
    """The costs of a finished run."""
    behind = [plan.steps[part] for part in lineage(plan)]
    training = [step for step in behind if activity(step.kind) == "training"]
    asked = [step for step in plan.steps.values() if activity(step.kind) == "evaluation"]
    return Costs(
        trained_parameters=max((_changed(step, store) for step in training), default=0),
        stored_bytes_per_modality=_bytes_beyond_backbone(plan, store) / len(plan.recipe.order),
        carried_bytes=_bytes_carried(plan, store),
        replay_rows=_rows_kept(plan, training, store),
        training_seconds=seconds_of(training, store),
        evaluating_seconds=seconds_of(asked, store),
    )


def activity(kind: str) -> Activity:
    """What a step of a kind is doing."""
    return _ACTIVITIES.get(kind, "training")


def seconds_of(steps: Iterable[Step], store: Store) -> float:
    """What finished steps took when they were computed, whichever run did that."""
    return math.fsum(seconds for step in steps if (seconds := step_seconds(step, store)))


def seconds_by_step(plan: RunPlan, store: Store) -> dict[str, float]:
    """`<kind>/<fingerprint>` -> what each finished step of a plan took."""
    found = {
        f"{reference.kind}/{reference.fingerprint}": step_seconds(step, store)
        for reference, step in plan.steps.items()
    }
    return {name: seconds for name, seconds in sorted(found.items()) if seconds is not None}


def seconds_by_activity(by_step: Iterable[Mapping[str, float]]) -> dict[Activity, float]:
    """Activity -> what its steps took in all runs, a step that several share counted once.

    Args:
        by_step: of each run, from `seconds_by_step`.
    """
    found: dict[Activity, float] = dict.fromkeys(get_args(Activity), 0.0)
    for name, seconds in {key: value for run in by_step for key, value in run.items()}.items():
        found[activity(name.partition("/")[0])] += seconds
    return found


def step_seconds(step: Step, store: Store) -> float | None:
    """What a finished step took; `None` where that is not recorded, or the step not there."""
    return recorded_seconds(_notes(step, store))


@dataclass(frozen=True)
class Window:
    """A stretch of time, from one second since the epoch to another."""

    started: float
    ended: float

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.ended - self.started


def busy_seconds(steps: Iterable[Step], store: Store, window: Window) -> float:
    """How many seconds of a window some finished step computed."""
    spans = []
    for step in steps:
        file = _notes(step, store) / TIMING
        timing = json.loads(file.read_text("utf-8")) if file.exists() else {}
        seconds = timing.get("last_session_seconds", timing.get("step_seconds"))
        end = file.stat().st_mtime if seconds is not None else 0.0
        if seconds is not None and end > window.started and end - seconds < window.ended:
            spans.append((max(window.started, end - seconds), min(window.ended, end)))
    busy, reached = 0.0, window.started
    for start, end in sorted(spans):
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy


def _notes(step: Step, store: Store) -> Path:
    return store.notes(step.kind, step.reference.fingerprint)


def model_parts(plan: RunPlan, stage: int | None = None) -> dict[str, set[Reference]]:
    """Role -> parts of the model at a stage's end, as evaluated.

    Args:
        plan: the run.
        stage: its index; the last if `None`. Where there are no stages, all experts are parts.
    """
    chosen = stage or (plan.stages[-1].index if plan.stages else 0)
    point = "final" if plan.stages else "expert"
    found: dict[str, set[Reference]] = {}
    for score in plan.scores:
        if score.point == point and score.stage == chosen and score.modality != JOINT:
            for role, parent in plan.steps[score.reference].parents.items():
                if not role.startswith("features."):
                    found.setdefault(role, set()).add(parent)
    return found


def lineage(plan: RunPlan, stage: int | None = None) -> list[Reference]:
    """All steps that the model at a stage's end comes from; the last if `None`."""
    waiting = [part for parts in model_parts(plan, stage).values() for part in parts]
    seen: dict[Reference, None] = {}
    while waiting:
        reference = waiting.pop()
        if reference not in seen:
            seen[reference] = None
            waiting += plan.steps[reference].parents.values()
    return list(seen)


def _bytes_beyond_backbone(plan: RunPlan, store: Store) -> float:
    files: dict[Path, int] = {}
    own: list[int] = []
    for role, parts in sorted(model_parts(plan).items()):
        for part in parts:
            folder = store.local(part.kind, part.fingerprint)
            group, _, modality = role.partition(".")
            if group == "connector":
                paths = [folder / f"connector-{modality}.safetensors"]
            else:
                inner = folder / "backbone"
                paths = sorted((inner if inner.is_dir() else folder).rglob("*.safetensors"))
            files |= {path: _size(path) for path in paths}
            if role == "backbone":
                own.append(sum(files[path] for path in paths if path.parent == folder / "backbone"))
    return sum(files.values()) - max(own)


def _bytes_carried(plan: RunPlan, store: Store) -> float:
    """Bytes that the last stage's steps read of earlier ones beside the model between them."""
    if not plan.stages:
        return 0.0
    last, model = plan.stages[-1], _model_before(plan)
    kept: dict[_Part, float] = {}
    for step in (plan.steps[reference] for reference in lineage(plan)):
        for role, parent in step.parents.items() if step.stage == last.index else ():
            group, _, modality = role.partition(".")
            if modality == last.modality or plan.steps[parent].kind in ("backbone", "bundle"):
                continue  # new, theta_0, or of the model that `graftline add` was given
            if group == "features":
                part = (parent, "train/")
                kept[part] = max(step.parameters.get("fraction", 1.0), kept.get(part, 0.0))
            elif plan.steps[parent].stage < last.index:
                part = (parent, _files_of(group, modality))
                kept |= {part: 1.0} if part not in model else {}
    return math.fsum(share * _listed(store, part) for part, share in kept.items())


def _files_of(group: str, modality: str) -> str:
    """How the files begin that a step reads of a parent in some role."""
    if group in ("connector", "taught"):
        return f"connector-{modality}."
    named = ("subspace", "logits", "fisher", "statistics", "adapters")
    return group if group in named else "backbone/"


def _model_before(plan: RunPlan) -> set[_Part]:
    """Parts of the model that the last stage starts from, and what its adapters are made of."""
    if len(plan.stages) < 2:
        return set()
    before = plan.stages[-2].final
    backbones = {before.backbone, *before.experts.values(), *([before.base] if before.base else [])}
    backbones |= {p for part in before.adapters.values() for p in plan.steps[part].parents.values()}
    connectors = {(part, f"connector-{name}.") for name, part in before.connectors.items()}
    adapters = {(part, "adapters") for part in before.adapters.values()}
    return {(part, "backbone/") for part in backbones} | connectors | adapters


def _listed(store: Store, part: _Part) -> int:
    """Bytes of weights among an artifact's files, by its manifest."""
    reference, start = part
    folder = store.notes(reference.kind, reference.fingerprint)
    files = read_manifest(folder)["files"].items()
    return sum(
        int(entry["size"])
        for name, entry in files
        if name.startswith(start) and name.endswith(".safetensors")
    )


def _size(file: Path) -> int:
    return sum(entry.size for entry in read_header(file).values())


def _rows_kept(plan: RunPlan, training: Iterable[Step], store: Store) -> int:
    """Rows that steps with a `fraction` were given of; all, where one step sees all modalities."""
    counts = {
        step.parameters["modality"]: train_rows(_notes(step, store))
        for step in plan.steps.values()
        if step.kind == "features"
    }
    kept = dict.fromkeys(counts, 0)
    for step in training:
        fraction = step.parameters.get("fraction")
        together = len(step.parameters.get("modalities", ())) > 1
        for role in step.parents:
            group, _, modality = role.partition(".")
            if group == "features" and (fraction is not None or together):
                count = counts[modality]
                rows = count if fraction is None else len(replay_rows(count, fraction, 0))
                kept[modality] = max(kept[modality], rows)
    return sum(kept.values())


def _changed(step: Step, store: Store) -> int:
    """Weights in the model's tensors of a step's artifact that none of its parents holds so."""
    folder = store.local(step.kind, step.reference.fingerprint)
    parents = [store.local(p.kind, p.fingerprint) for p in step.parents.values()]
    rank = step.parameters["lora"]["rank"] if step.parameters.get("mode") == "lora" else None
    count = 0
    for file in [*folder.glob("backbone/*.safetensors"), *folder.glob("connector-*.safetensors")]:
        inside = file.relative_to(folder)
        before = [read_header(p / inside) for p in parents if (p / inside).is_file()]
        measured = _measured(file)
        for name, entry in read_header(file).items():
            known = (header[name] for header in before if name in header)
            if name in measured or any(_same(entry, other) for other in known):
                continue
            low_rank = rank is not None and len(entry.shape) == 2 and before
            count += (rank or 0) * sum(entry.shape) if low_rank else entry.elements
    return count


def _measured(file: Path) -> set[str]:
    """Tensors of a connector that are statistics of its features, and no weights."""
    _, is_connector, modality = file.stem.partition("connector-")
    if not is_connector:
        return set()
    return {name for name, _ in read_record(file.parent, modality).build().named_buffers()}


def _same(one: Entry, other: Entry) -> bool:
    """Whether two tensors hold the same numbers, in whatever dtype."""
    if one.shape != other.shape:
        return False
    pairs = zip(_chunks(one), _chunks(other), strict=True)
    return all(np.array_equal(mine, theirs) for mine, theirs in pairs)


def _chunks(entry: Entry) -> Iterator[NDArray[np.generic]]:
    width = entry.size // max(1, entry.elements)
    for first in range(0, entry.elements, _CHUNK):
        count = min(_CHUNK, entry.elements - first)
        with entry.file.open("rb") as stream:
            stream.seek(entry.start + first * width)
            content = stream.read(count * width)
        yield _numbers(content, entry.dtype)


def _numbers(content: bytes, dtype: str) -> NDArray[np.generic]:
    if dtype == "BF16":
        return (np.frombuffer(content, "<u2").astype(np.uint32) << _SHIFT).view(np.float32)
    known = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
    return np.frombuffer(content, known.get(dtype, "u1"))


def train_rows(features: Path) -> int:
    """How many training rows a features artifact's folder holds."""
    return int(read_metadata(features / "train" / ROWS).num_rows)
