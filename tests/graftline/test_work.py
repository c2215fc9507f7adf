"""How long a realigning step trains, by what was kept of its modality's rows."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from graftline.data.examples import ROWS
from graftline.recipe import load_recipe
from graftline.run_plan import plan_run
from graftline.store import Artifact
from graftline.work import Machine, Work, realign_settings

TINY = Path(__file__).resolve().parents[2] / "params/tiny.yaml"
FILES = {name: dict.fromkeys(("train", "validation", "test"), "0") for name in ("image", "audio")}


def _work(folder: Path, **changes: object) -> Work:
    """A realigning of 80 steps of 8 rows, beside 320 training rows of which a share was kept."""
    given = {"realign.steps": 80, "realign.batch_size": 8, "replay.fraction": 0.1}
    changes = {**given, "order": ["image", "audio"], **changes}
    plan = plan_run(load_recipe(TINY, changes), FILES)
    step = next(each for each in plan.steps.values() if each.kind == "realign")
    modality = step.parameters["modality"]
    (folder / "train").mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"id": range(320)}), folder / "train" / ROWS)
    features = Artifact("features", "0" * 64, folder)
    return Work(step, {f"features.{modality}": features}, Machine(folder), folder, folder)


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({}, 80),
        ({"realign.passes": 2}, 8),  # 32 rows are four batches
        ({"realign.passes": 0.5}, 2),
        ({"realign.passes": 0.1}, 1),
        ({"realign.passes": 1000}, 80),
        ({"realign.passes": 2, "replay.fraction": 1.0}, 80),
        ({"realign.passes": 2, "replay.fraction": 0.001}, 2),  # one row, a batch of its own
    ],
)
def test_few_rows_are_not_seen_again_and_again(
    tmp_path: Path, changes: dict[str, object], steps: int
) -> None:
    assert realign_settings(_work(tmp_path, **changes)).steps == steps


def test_a_recipe_that_sets_no_passes_has_the_steps_it_had(tmp_path: Path) -> None:
    assert "passes" not in _work(tmp_path).step.parameters
    assert _work(tmp_path, **{"realign.passes": 2}).step.parameters["passes"] == 2
