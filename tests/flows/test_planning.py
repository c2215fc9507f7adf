"""`graftline plan` on the finished tiny run, and on recipes that cannot run."""

from __future__ import annotations

import json
import shutil

import pytest
from typer.testing import CliRunner

from flows.cli import app
from flows.options import out


def _plan(project, *arguments):
    """Exit code, and what is printed with the error behind it, as `flows.cli.main` shows it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project.folder)
        patch.setattr(out, "width", 200)
        result = CliRunner().invoke(app, ["plan", "params/tiny.yaml", *arguments])
    return result.exit_code, f"{result.stdout}{result.exception or ''}"


def test_a_finished_run_costs_nothing_more(finished):
    before = finished.artifacts()
    code, text = _plan(finished, "--json")
    assert code == 0, text
    found = json.loads(text)
    assert found["to_run"] == 0
    assert found["cached"] == len(found["steps"])
    assert found["fingerprint"] == finished.metrics()["fingerprint"]
    assert found["training_flops"] == found["seconds"] == found["disk_bytes"] == 0
    assert finished.artifacts() == before


def test_another_method_is_priced_before_it_starts(finished):
    code, text = _plan(finished, "--method", "joint", "--json")
    assert code == 0, text
    found = json.loads(text)
    todo = [step for step in found["steps"] if not step["cached"]]
    assert {step["kind"] for step in todo} == {
        "fine-tune",
        "evaluate",
        "evaluate-joint",
        "perplexity",
    }
    assert all(step["seconds"] > 0 for step in todo)
    assert found["kinds_without_history"] == []
    [tune] = [step for step in todo if step["kind"] == "fine-tune"]
    assert found["training_flops"] == tune["training_flops"]
    assert found["memory_bytes"] == tune["memory_bytes"]
    code, text = _plan(finished, "--method", "joint")
    assert code == 0, text
    for words in ("to run", "cached", "FLOP", "N = ", "stage 4", "audio + image + point"):
        assert words in text


def test_tokens_are_estimated_close_to_what_training_saw(finished):
    _, text = _plan(finished, "--json")
    estimated = json.loads(text)["tokens_a_row"]
    for path in finished.folder.glob("artifacts/align/*/history.json"):
        manifest = json.loads((path.parent / "manifest.json").read_text())["parameters"]
        rows = manifest["steps"] * manifest["batch_size"]
        seen = json.loads(path.read_text())["tokens"] / rows
        assert estimated[manifest["modality"]] == pytest.approx(seen, rel=0.2)


def test_without_data_and_history_it_says_so(tmp_path, finished):
    project = type(finished)(tmp_path)
    shutil.copytree(finished.folder / "params", tmp_path / "params")
    code, text = _plan(project)
    assert code == 0, text
    assert "not built yet"[:12] in text
    assert "unknown" in text
    assert not (tmp_path / "artifacts").exists()
    assert not (tmp_path / "data").exists()


def test_problems_are_listed_together(copy):
    shutil.rmtree(copy.folder / "data/video")
    code, text = _plan(copy, "--set", "modalities.image.encoder=efficientnet")
    assert code == 1
    for words in ("2 problem(s)", "modalities.image.encoder", "video has no data"):
        assert words in text


def test_a_damaged_artifact_is_named_before_a_run_meets_it(copy):
    for path in copy.folder.glob("artifacts/backbone/*/backbone/model.safetensors"):
        path.write_bytes(path.read_bytes()[:-10])
    code, text = _plan(copy)
    assert code == 1
    assert "model.safetensors" in text.replace("\n", "")
    assert "Delete the folder" in text
