"""The recipes at the papers' scale are priced before a weight is fetched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli import app
from flows.options import out

ROOT = Path(__file__).resolve().parents[2]
PARAMETERS = {
    "mera-llama-3-8b": 8_030_261_248,
    "mera-vicuna-7b": 6_738_415_616,
    "mmer-vicuna-7b": 6_738_415_616,
}


def _plan(recipe: str, *arguments: str):
    result = CliRunner().invoke(app, ["plan", f"params/{recipe}.yaml", *arguments])
    return result.exit_code, result.stdout, str(result.exception or "")


@pytest.fixture(autouse=True)
def _working_copy(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "params", tmp_path / "params")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(out, "width", 200)


@pytest.mark.parametrize("recipe", sorted(PARAMETERS))
def test_it_is_priced_and_says_what_to_fill_in(recipe):
    code, text, problems = _plan(recipe, "--json")
    assert code == 1
    found = json.loads(text)
    assert found["backbone_parameters"] == PARAMETERS[recipe]
    for where in ("backbone.source", *(f"modalities.{m}.encoder" for m in ("image", "video"))):
        assert f"{where}: revision: " in problems
    assert problems.count("is not pinned") == 4
    for modality in found["order"]:
        assert f"modalities.{modality}.data: media/" in problems  # no such folder
    assert found["cached"] == 0 and found["to_run"] == len(found["steps"])
    tuned = [step for step in found["steps"] if step["kind"] == "fine-tune"]
    # LoRA: 4 N operations a token
    image = 4.0 * PARAMETERS[recipe] * 6000 * 16 * found["tokens_a_row"]["image"]
    assert image in [step["training_flops"] for step in tuned]
    # every test row once an evaluation, 2 N operations a token of prompt and answer
    asked = 2.0 * PARAMETERS[recipe] * 5000 * (found["tokens_a_row"]["image"] + 32)
    encoded = 2.0 * 303_500_000 * 577 * 433_000
    assert found["inference_flops"] > asked + encoded
    total = found["training_flops"] + found["inference_flops"]
    assert found["gpu_hours"] == pytest.approx(total / 120e12 / 3600)
    assert 1 < found["gpu_hours"] < 100
    # bf16 weights and what LoRA trains beside them; answering, masked experts hold three copies
    copies = 3 if recipe.startswith("mmer") else 1
    weights = copies * 2 * PARAMETERS[recipe]
    assert weights <= found["memory_bytes"] < 2 * weights
    assert found["disk_bytes"] > 5 * 2 * PARAMETERS[recipe]
    assert not Path("artifacts").exists()


def test_the_table_says_how_it_is_known():
    _, text, problems = _plan("mera-llama-3-8b")
    for words in ("GPU hours", "120 TFLOP/s", "inference", "N = 8,030,261,248", "stage 4"):
        assert words in text
    assert "git ls-remote https://huggingface.co/meta-llama/Meta-Llama-3-8B-Instruct" in problems


def test_pinned_revisions_leave_the_data_alone_to_be_filled_in(tmp_path):
    path = tmp_path / "params/mera-llama-3-8b.yaml"
    text = path.read_text()
    assert text.count("revision: null") == 4
    path.write_text(text.replace("revision: null", f"revision: '{'0' * 40}'"))
    _, _, problems = _plan("mera-llama-3-8b")
    assert " is not pinned" not in problems.replace("test_pinned", "")
    assert "modalities.image.data" in problems
