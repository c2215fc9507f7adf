"""What a run of two modalities starts from, without encoders: a tiny theta_0, made-up features."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from graftline.data.build import checksums
from graftline.data.encoding import encode_ply
from graftline.data.rows import schema
from graftline.planning.plan import Step
from graftline.planning.run import RunPlan, plan_run
from graftline.settings.reading import load_recipe
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


def point_clouds(folder: Path) -> dict[str, str]:
    """Splits of one modality, made up; returns the md5 of each file."""
    generator = np.random.default_rng(0)
    (folder / "point_cloud").mkdir(parents=True)
    for split, count in zip(SPLITS, (150, 70, 1), strict=True):
        rows = [
            {
                "id": f"point_cloud-{split}-{row}", "task": "question", "question": "What?",
                "answers": ["a cloud"], "source": f"{split}-{row}",
                "media": encode_ply(generator.standard_normal((40, 3)).astype(np.float32)),
            }
            for row in range(count)
        ]  # fmt: skip
        table = pa.Table.from_pylist(rows, schema())
        pq.write_table(table, folder / "point_cloud" / f"{split}.parquet", row_group_size=32)
    return {split: checksums(folder)[f"point_cloud/{split}.parquet"] for split in SPLITS}
