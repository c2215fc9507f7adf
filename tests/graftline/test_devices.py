"""The same run on every device: a GPU's, where there is one, ends where the CPU's does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from graftline.steps.execution import execute
from graftline.steps.work import Machine
from tests.graftline.made_up import filled_store, planned

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
        ],
    ),
]
SETTINGS = {
    "order": ["image", "audio"], "evaluation.references": False, "align.steps": 2,
    "fine_tune.steps": 3, "realign.steps": 2,
}  # fmt: skip


def _carried_out(run, root: Path, device: str, tiny_folder: Path, features_folder: Path):
    """Losses of every training step by its label, and every answer's id."""
    store = filled_store(root, run, tiny_folder, features_folder)
    losses, answered = {}, {}
    for step in run.steps.values():
        if step.kind.startswith("perplexity"):
            continue
        artifact = execute(step, store, Machine(root, device))
        if (artifact.folder / "history.json").is_file():
            history = json.loads((artifact.folder / "history.json").read_text())
            losses[step.label, step.stage] = history["losses"]
        if (artifact.folder / "answers.parquet").is_file():
            answered[step.label, step.stage] = artifact.folder
    return losses, answered


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_device_learns_what_the_cpu_learns(
    device: str, precision: str, tmp_path: Path, tiny_folder: Path, features_folder: Path
) -> None:
    run = planned("mera", precision=precision, **SETTINGS)
    inputs = (tiny_folder, features_folder)
    wanted, asked = _carried_out(run, tmp_path / "wanted", "cpu", *inputs)
    found, answered = _carried_out(run, tmp_path / "found", device, *inputs)
    assert found.keys() == wanted.keys() and answered.keys() == asked.keys() and asked
    assert {len(losses) for losses in wanted.values()} == {2, 3}
    for key, losses in wanted.items():
        close = (
            {"rel": 0.05 if precision == "bfloat16" else 1e-3} if device != "cpu" else {"abs": 0}
        )
        assert found[key] == pytest.approx(losses, **close), key
