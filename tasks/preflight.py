"""What can be known to fail before anything is computed, all of it at once."""

from __future__ import annotations

import os
import shutil
from importlib.metadata import entry_points
from pathlib import Path

from mlflow.utils.uri import get_uri_scheme

from graftline.durable import nearest, why_unwritable
from graftline.errors import GraftlineError
from graftline.model.opening import DTYPES
from graftline.object_urls import without_credentials
from graftline.planning.forecast import BackboneShape, backbone_shape
from graftline.planning.inference import feature_bytes, known_rows
from graftline.planning.plan import Step, is_done
from graftline.planning.run import RunPlan
from graftline.recipe import Recipe
from graftline.settings.models import BackboneSource
from graftline.store import Store
from graftline.stores import machine_folder
from tasks import tracking

# bf16 folder of each backbone, in bytes; training keeps an fp32 copy and two moments beside it.
_BACKBONE_BYTES = {"smollm2-135m-instruct": 300_000_000, "tiny-random": 2_000_000}
_OTHER_BACKBONE_BYTES = 300_000_000
_TRAINING_FACTOR = 5  # a checkpoint in bytes of a backbone in bfloat16
_SMALL_STEP_BYTES = 10_000_000
_ANSWER_TOKENS = 8  # of a row, about
_VOCABULARY = 50_000
_STATE_BYTES = 12  # a trained weight's fp32 master and two moments
_HOLDING_BACKBONES = (
    "backbone", "merge", "weighted-merge", "compose", "guarded-fine-tune", "fisher",
)  # fmt: skip
_TRACKING = (
    "http", "https", "sqlite", "postgresql", "mysql", "mssql", "file", "databricks",
    "databricks-uc", "uc",
)  # fmt: skip


class PreflightError(GraftlineError):
    """What stands in the way of a run; the message lists every problem."""


def check_folders(recipe: Recipe, report: Path) -> None:
    """Writes a block where the run will write: its artifacts, its report, MLflow's database.

    Args:
        recipe: the recipe.
        report: the folder of its report.

    Raises:
        PreflightError: lists every folder that cannot be written, and what to do; and what is no
            address of MLflow's.
    """
    wanted = {
        machine_folder(
            recipe.store
        ): "make it writable or choose another folder with --set store=<folder>",
        report: "move away what is in its place, or make it writable",
    }
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        wanted[tracking.FOLDER] = "move away what is in its place, or make it writable"
    problems = [
        f"{folder}: cannot be written ({why}); {advice}"
        for folder, advice in wanted.items()
        if (why := why_unwritable(folder)) is not None
    ]
    if uri and (get_uri_scheme(uri) or uri) not in {*_TRACKING, *_tracking_plugins()}:
        said = without_credentials(uri)
        problems.append(
            f"MLFLOW_TRACKING_URI: {said} is no address that MLflow knows; for a server write "
            f"http://{said.rpartition('://')[2]}"
        )
    if problems:
        raise PreflightError("\n".join(problems))


def _tracking_plugins() -> list[str]:
    return [each.name for each in entry_points(group="mlflow.tracking_store")]


def bytes_needed(plan: RunPlan, store: Store) -> int:
    """Estimate of what a plan's unfinished steps will write, in bytes."""
    size, training = _sizes(plan, store)
    todo = [step for step in plan.steps.values() if not is_done(step, store)]
    heavy = [
        step
        for step in todo
        if step.kind in _HOLDING_BACKBONES
        or (step.kind == "fine-tune" and step.parameters["mode"] != "connector")
    ]
    execution = plan.recipe.execution
    at_once = min(execution.slots, execution.fine_tunings)
    # The one before is removed when a checkpoint is whole.
    trains = any(step.kind.endswith("fine-tune") for step in heavy)
    checkpoints = 2 * training * at_once if trains else 0
    written = len(heavy) + sum(step.kind == "fisher" for step in heavy)  # that is in float32
    features = [s for s in todo if s.kind == "features"]
    encoded = [feature_bytes(s, plan.recipe) or 0 for s in features]
    cached = sum(encoded) + max(encoded, default=0)  # shares stay until they are published
    recorded = sum(_logits_bytes(step, plan.recipe) for step in todo if step.kind == "logits")
    small = (len(todo) - len(heavy)) * _SMALL_STEP_BYTES
    return written * size + checkpoints + cached + recorded + small


def _logits_bytes(step: Step, recipe: Recipe) -> int:
    """What is recorded of a modality's kept rows, a vocabulary wide for each token of an answer."""
    rows = known_rows(recipe, str(step.parameters["modality"])).get("train", 0)
    size = recipe.backbone.size
    words = size.vocab_size if size is not None else _VOCABULARY
    kept = rows * float(step.parameters["fraction"]) * _ANSWER_TOKENS
    return round(kept * words * DTYPES[recipe.precision].itemsize)


def _sizes(plan: RunPlan, store: Store) -> tuple[int, int]:
    """Bytes of a backbone's folder, and of the largest checkpoint of its training."""
    recipe = plan.recipe
    if not isinstance(recipe.backbone.source, BackboneSource):
        size = _BACKBONE_BYTES[recipe.backbone.source]
        return size, _TRAINING_FACTOR * size
    shape: BackboneShape | None = backbone_shape(recipe, [(0, list(plan.steps.values()))], store)
    if shape is None:
        return _OTHER_BACKBONE_BYTES, _TRAINING_FACTOR * _OTHER_BACKBONE_BYTES
    lora = recipe.fine_tune.mode == "lora"
    trained = shape.adapters(recipe.fine_tune.lora.rank) if lora else shape.parameters
    return shape.parameters * DTYPES[recipe.precision].itemsize, trained * _STATE_BYTES


def check_disk(plan: RunPlan, store: Store) -> None:
    """Compares the estimate with what is free where the store lies.

    Raises:
        PreflightError: there is not enough.
    """
    needed = bytes_needed(plan, store)
    free = shutil.disk_usage(nearest(store.root)).free
    if needed > free:
        raise PreflightError(
            f"{os.path.abspath(store.root)}: the run needs about {needed / 1e9:.1f} GB there and "
            f"{free / 1e9:.1f} GB are free; free some space or use --set store=<folder>"
        )
