"""`graftline plan` on the finished tiny run, and on recipes that cannot run."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from flows.cli import app
from flows.options import no_data, out
from flows.planning import cost_table, look_ahead
from graftline.data import build as building
from graftline.errors import GraftlineError
from graftline.settings.reading import load_recipe
from tasks.data import build_data

TINY = Path(__file__).resolve().parents[2] / "params" / "tiny.yaml"


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
    assert "not built yet" in text
    assert "unknown" in text
    assert not (tmp_path / "artifacts").exists()
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("folder", "order", "made", "words"),
    [
        ("data", ["image"], (), None),
        ("./data", ["image"], (), None),
        ("mine", ["image"], ("mine/image",), None),
        (
            "mine",
            ["image"],
            (),
            "mine: there is no such folder; `graftline data build --folder mine`",
        ),
        ("mine", ["image"], ("mine",), "mine: is empty; `graftline data build --folder mine`"),
        ("mine", ["image"], ("mine.dvc",), "makes the starter's; `dvc pull mine.dvc` fetches"),
        (
            "data",
            ["image", "xray"],
            (),
            "data: there is no such folder, and the starter has no rows",
        ),
    ],
)
def test_the_starter_s_data_are_made_in_their_own_place_alone(
    folder, order, made, words, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    built = []
    monkeypatch.setattr(building, "build", lambda target, progress: built.append(target))
    for name in made:
        if name == "mine.dvc":
            Path(name).write_text("outs: [{md5: 0.dir, path: mine}]\n")
        else:
            Path(name).mkdir(parents=True)
    xray = {"encoder": "efficientnet-lite0", "media": "image"}
    recipe = load_recipe(TINY, {"order": order, "modalities.xray": xray, "data.folder": folder})
    prospect = look_ahead(recipe, order)
    said = [line for line in prospect.problems if line.startswith("data.folder")]
    if words is None:
        assert said == []
        build_data.fn(folder, "artifacts", order)
        assert built == ([] if made else [Path(folder)])
        return
    assert len(said) == 1 and said[0].startswith(f"data.folder: {folder}") and words in said[0]
    with pytest.raises(GraftlineError, match=re.escape(said[0])):
        build_data.fn(folder, "artifacts", order)
    assert str(no_data(recipe, TINY)) == said[0]
    assert built == []


def test_data_that_are_not_there_are_called_so_in_full(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    console = Console(width=200)
    with console.capture() as text:
        console.print(cost_table(look_ahead(load_recipe(TINY, {"order": ["image"]}), ["image"])))
    assert "not built yet" in text.get()


def test_problems_are_listed_together(copy):
    shutil.rmtree(copy.folder / "data/video")
    code, text = _plan(copy, "--set", "modalities.image.encoder=efficientnet")
    assert code == 1
    for words in ("2 problem(s)", "modalities.image.encoder", "video has no data"):
        assert words in text


def test_a_run_names_a_wrong_device_with_the_other_problems(copy):
    wrong = ("modalities.image.encoder=efficientnet", "execution.device=gpu", "precision=bfloat16")
    code, text = copy.run("run", "params/tiny.yaml", *(w for s in wrong for w in ("--set", s)))
    assert code == 1 and "Traceback" not in text, text
    for words in ("2 problem(s)", "modalities.image.encoder", "execution.device: gpu cannot be"):
        assert words in text


def test_a_damaged_artifact_is_named_before_a_run_meets_it(copy):
    for path in copy.folder.glob("artifacts/backbone/*/backbone/model.safetensors"):
        path.write_bytes(path.read_bytes()[:-10])
    code, text = _plan(copy)
    assert code == 1
    assert "model.safetensors" in text.replace("\n", "")
    assert "Delete the folder" in text
