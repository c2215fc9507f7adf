"""What can be known to fail before anything is computed, all of it at once."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from graftline.errors import GraftlineError
from graftline.execution import is_done
from graftline.recipe import Recipe
from graftline.run_plan import RunPlan
from graftline.store import Store
from graftline.stores import machine_folder
from tasks import tracking

# bf16 folder of each backbone, in bytes; training keeps an fp32 copy and two moments beside it.
_BACKBONE_BYTES = {"smollm2-135m-instruct": 300_000_000, "tiny-random": 2_000_000}
_OTHER_BACKBONE_BYTES = 300_000_000
_TRAINING_FACTOR = 7
_SMALL_STEP_BYTES = 10_000_000


class PreflightError(GraftlineError):
    """What stands in the way of a run; the message lists every problem."""


def check_folders(recipe: Recipe, report: Path) -> None:
    """Writes a file where the run will write: its artifacts, its report, MLflow's database.

    Args:
        recipe: the recipe.
        report: the folder of its report.

    Raises:
        PreflightError: lists every folder that cannot be written, and what to do.
    """
    wanted = {
        machine_folder(
            recipe.store
        ): "make it writable or choose another folder with --set store=<folder>",
        report: "move away what is in its place, or make it writable",
    }
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        wanted[tracking.FOLDER] = "move away what is in its place, or make it writable"
    problems = []
    for folder, advice in wanted.items():
        try:
            with tempfile.TemporaryFile(dir=nearest(folder)):
                pass
        except OSError as error:
            problems.append(f"{folder}: cannot be written ({error.strerror}); {advice}")
    if problems:
        raise PreflightError("\n".join(problems))


def nearest(folder: Path) -> Path:
    """The folder itself, or what stands where its first missing parent would be made."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def bytes_needed(plan: RunPlan, store: Store) -> int:
    """Estimate of what a plan's unfinished steps will write, in bytes."""
    size = _BACKBONE_BYTES.get(plan.recipe.backbone.source, _OTHER_BACKBONE_BYTES)
    todo = [step for step in plan.steps.values() if not is_done(step, store)]
    heavy = [
        step
        for step in todo
        if step.kind in ("backbone", "merge", "compose", "guarded-fine-tune", "fisher")
        or (step.kind == "fine-tune" and step.parameters["mode"] != "connector")
    ]
    checkpoints = _TRAINING_FACTOR * size if any(s.kind.endswith("fine-tune") for s in heavy) else 0
    written = len(heavy) + sum(step.kind == "fisher" for step in heavy)  # that is in float32
    return written * size + checkpoints + (len(todo) - len(heavy)) * _SMALL_STEP_BYTES


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
