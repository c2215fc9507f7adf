"""What a run of two modalities starts from, without encoders: a tiny theta_0, made-up features."""

from __future__ import annotations

import shutil
from pathlib import Path

from graftline.plan import Step
from graftline.recipe import load_recipe
from graftline.run_plan import RunPlan, plan_run
from graftline.store import Store

TINY = Path(__file__).parents[2] / "params" / "tiny.yaml"
SPLITS = ("train", "validation", "test")
ORDER = ("image", "audio", "video", "point_cloud")
FILES = {name: {split: f"{name}-{split}" for split in SPLITS} for name in ORDER}


def planned(method: str, **changes: object) -> RunPlan:
    """The tiny recipe's run by a method."""
    return plan_run(load_recipe(TINY, {"method": method, **changes}), FILES)


def filled_store(root: Path, run: RunPlan, backbone: Path, features: Path) -> Store:
    """A store that holds what a run starts from."""
    store = Store(root)

    def fill(step: Step):
        def build(out: Path) -> None:
            if step.kind == "backbone":
                shutil.copytree(backbone, out / "backbone")
            else:
                shutil.copytree(features, out, dirs_exist_ok=True)

        return build

    for step in run.steps.values():
        if step.kind in ("backbone", "features"):
            parents = {role: parent.fingerprint for role, parent in step.parents.items()}
            store.publish(
                step.kind, step.reference.fingerprint, parameters=dict(step.parameters),
                parents=parents, code=step.code, build=fill(step),
            )  # fmt: skip
    return store
