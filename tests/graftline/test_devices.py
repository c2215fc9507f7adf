"""The same run on every device: a GPU's, where there is one, ends where the CPU's does."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from graftline.steps.execution import execute
from graftline.steps.work import Machine
from tests.graftline.made_up import filled_store, planned

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
]
METHODS = ("mera", "ewc", "mera-distilled", "mmer", "pathweave")
SETTINGS = {
    "order": ["image", "audio"], "evaluation.references": False, "align.steps": 2,
    "fine_tune.steps": 8, "fine_tune.learning_rate": 3e-3, "realign.steps": 2, "distil.steps": 3,
}  # fmt: skip


def _carried_out(run, root: Path, device: str, tiny_folder: Path, features_folder: Path):
    """Losses of every training step by its label, and what was answered to every row."""
    store = filled_store(root, run, tiny_folder, features_folder)
    losses, answers = {}, {}
    for step in run.steps.values():
        if step.kind.startswith("perplexity"):
            continue
        artifact = execute(step, store, Machine(root, device))
        if (artifact.folder / "history.json").is_file():
            history = json.loads((artifact.folder / "history.json").read_text())
            losses[step.title] = history["losses"]
        if (artifact.folder / "answers.parquet").is_file():
            table = pq.read_table(artifact.folder / "answers.parquet")
            for row in table.to_pylist():
                answers[step.title, row["id"]] = row["answer"]
    return losses, answers


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("device", "method"),
    [("cpu", "mera"), *(pytest.param("cuda", method, marks=GPU) for method in METHODS)],
)
def test_a_device_learns_what_the_cpu_learns(
    device: str, method: str, precision: str, tmp_path: Path, tiny_folder: Path,
    features_folder: Path,
) -> None:  # fmt: skip
    run = planned(method, precision=precision, **SETTINGS)
    inputs = (tiny_folder, features_folder)
    wanted, asked = _carried_out(run, tmp_path / "wanted", "cpu", *inputs)
    found, answered = _carried_out(run, tmp_path / "found", device, *inputs)
    assert found.keys() == wanted.keys() and answered.keys() == asked.keys()
    assert {2, 8} <= {len(losses) for losses in wanted.values()}
    # Of losses how far apart, of answers how many the same: two words may be as likely.
    close, share = (1e-3, 0.95) if precision == "float32" else (0.05, 0.8)
    if device == "cpu":
        close, share = 0.0, 1.0
    for key, losses in wanted.items():
        assert found[key] == pytest.approx(losses, rel=close, abs=0), key
    same = sum(answered[row] == answer for row, answer in asked.items())
    assert any(asked.values()) and same >= share * len(asked)
