"""`graftline compare` on the tiny recipe: methods in two orders, resumed, with its page."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

from graftline.weight_files import read_header
from tests.flows.conftest import Project

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_server")]

PAIR = ("--set", "order=[image,audio]", "--methods", "mera,connector-only", "--orders", "latin")


def weights(project: Project, pattern: str, *but: str) -> int:
    """How many numbers an artifact holds, but for tensors with one of the words in their names."""
    file = next(project.folder.glob(f"artifacts/{pattern}.safetensors"))
    entries = read_header(file).items()
    return sum(entry.elements for name, entry in entries if not any(word in name for word in but))


def test_methods_are_compared_and_nothing_is_computed_twice(copy):
    usual = copy.folder / "reports/tiny/mera/seed-0/metrics.json"
    content = usual.read_bytes()
    code, text = copy.run("compare", "params/tiny.yaml", *PAIR, "--budget")
    assert code == 0, text
    assert "4 runs; prefix tree of the orders, for one method and seed: 4 stages" in text
    # mera: image alone, image then audio, audio alone (an expert), but not audio then image;
    # of connector-only nothing, and both orders end in the same model
    assert "stages: 3 of 7 are cached, 4 must run" in text
    assert "time: about" in text
    code, text = copy.run("compare", "params/tiny.yaml", *PAIR)
    assert code == 0, text
    folder = copy.folder / "reports/tiny/compare"
    names = {path.name for path in folder.iterdir()}
    assert names >= {"table.csv", "table.md", "page.html", "stages.png"}
    assert usual.read_bytes() == content
    for method in ("mera", "connector-only"):
        for order in ("image-audio", "audio-image"):
            path = copy.folder / f"reports/tiny/{method}/order-{order}/seed-0/metrics.json"
            metrics = json.loads(path.read_text())
            assert "-".join(metrics["order"]) == order
            assert 0.0 < metrics["idle_seconds"] <= metrics["wall_seconds"]
            if method == "mera":  # whose steps were not there
                assert metrics["idle_seconds"] < metrics["wall_seconds"]
            assert metrics["training_seconds"] < metrics["computing_seconds"]
            assert metrics["settings"] == metrics["fingerprint"]  # its seed is 0
    # what is reused was computed for some run, which says so and is named
    notes = copy.mlflow("select value, run_uuid from tags where key like 'artifact.%'")
    computed = {(note, run) for note, run in notes if "reused" not in note}
    reused = [note for note, _ in notes if "reused" in note]
    named = {tuple(note.removesuffix(")").split(" (reused from ")) for note in reused}
    assert named and named <= computed
    # a run is reported while later ones still compute
    first = copy.folder / "reports/tiny/mera/order-image-audio/seed-0/metrics.json"
    last = max(file.stat().st_mtime for file in copy.folder.glob("artifacts/*/*/manifest.json"))
    assert first.stat().st_mtime < last
    rows = {
        row["method"]: row
        for row in csv.DictReader((folder / "table.csv").read_text().splitlines())
    }
    mera, alone = rows["mera"], rows["connector-only"]
    files = [f"align/*/connector-{name}" for name in ("image", "audio")]
    trained = max(weights(copy, file, "mean", "deviation") for file in files)
    assert float(alone["trained_parameters"]) == trained
    backbone = weights(copy, "backbone/*/backbone/model", "embed")
    assert float(mera["trained_parameters"]) == backbone + trained
    # connectors are float32, and nothing else is kept beside one backbone
    kept = sum(weights(copy, file) for file in files) / 2
    assert float(alone["stored_bytes_per_modality"]) == 4 * kept
    assert mera["stored_bytes_per_modality"] == alone["stored_bytes_per_modality"]
    assert (float(alone["carried_bytes"]), float(mera["carried_bytes"]) > 0) == (0.0, True)
    assert (mera["replay_rows"], alone["replay_rows"]) == ("32.0", "0.0")  # 16 of 64, twice
    assert (mera["n"], mera["runs"], mera["orders"]) == ("32", "2", "image audio; audio image")
    page = (folder / "page.html").read_text()
    assert "://" not in page and "connector-only" in page
    assert "orchestration" in (folder / "table.md").read_text()

    before, files = copy.artifacts(), {path: path.read_bytes() for path in folder.iterdir()}
    runs = copy.mlflow("select count(*) from runs")
    code, text = copy.run("compare", "params/tiny.yaml", *PAIR)
    assert code == 0, text
    assert text.count("finished before") == 4
    assert "steps: " in text and " 0 must run" in text
    assert copy.artifacts() == before
    assert {path: path.read_bytes() for path in folder.iterdir()} == files
    assert copy.mlflow("select count(*) from runs") == runs
    assert copy.mlflow("select count(*) from runs where status != 'FINISHED'")[0][0] == 0
    assert copy.left_over() == []
    code, text = copy.run("compare", "params/tiny.yaml", "--methods", "mera")
    assert code == 0, text
    assert "mera seed 0: finished before" in text  # made by `run`


def test_reports_alone_are_compared_after_a_clone(copy):
    """Without artifacts nothing is computed, if reports are trusted and of this very version."""
    code, text = copy.run("compare", "params/tiny.yaml", *PAIR)
    assert code == 0, text
    folder = copy.folder / "reports/tiny/compare"
    before = {path: path.read_bytes() for path in folder.iterdir()}
    shutil.rmtree(folder)
    shutil.rmtree(copy.folder / "artifacts")
    arguments = ("compare", "params/tiny.yaml", *PAIR, "--trust-reports")
    code, text = copy.run(*arguments, "--budget")
    assert code == 0, text
    assert "4 of 4 runs are finished by their reports" in text
    code, text = copy.run(*arguments)
    assert code == 0, text
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert not any((copy.folder / "artifacts").glob("*/*/manifest.json"))

    other = copy.folder / "reports/tiny/mera/order-audio-image/seed-0/metrics.json"
    older = {k: v for k, v in json.loads(other.read_text()).items() if k != "carried_bytes"}
    other.write_text(json.dumps(older))  # of a version that did not record this cost
    code, text = copy.run(*arguments, "--budget")
    assert "4 of 4 runs are finished by their reports" in text
    other.write_text(other.read_text().replace('"fingerprint": "', '"fingerprint": "0'))
    code, text = copy.run(*arguments, "--budget")
    assert "3 of 4 runs are finished by their reports" in text
    assert "1 runs;" in text


def test_a_second_look_has_a_folder_of_its_own(copy):
    look = copy.folder / "reports/tiny/look"
    look.mkdir()
    for name in ("orders.png", "notes.txt"):  # of a comparison before, and of the user's own
        (look / name).write_text("there before")
    code, text = copy.run(
        "compare", "params/tiny.yaml", "--methods", "mera", "--out", "reports/tiny/look"
    )
    assert code == 0, text
    assert not (copy.folder / "reports/tiny/compare").exists()
    shown = {line for line in text.splitlines() if line.startswith("reports/tiny/look/")}
    assert shown >= {f"reports/tiny/look/{name}" for name in ("page.html", "table.md")}
    assert {path.name for path in look.iterdir()} - {Path(line).name for line in shown} == {
        "notes.txt"
    }
    assert "orders.png" not in text


def test_reports_of_other_data_are_refused_before_anything_is_computed(copy):
    other = copy.folder / "reports/other/mera/seed-0"
    shutil.copytree(copy.folder / "reports/tiny/mera/seed-0", other)
    metrics = json.loads((other / "metrics.json").read_text())
    (other / "metrics.json").write_text(json.dumps({**metrics, "data_md5": "0"}))
    before = copy.artifacts()
    code, text = copy.run(
        "compare", "params/tiny.yaml", "--methods", "mera,finetune", "--also", "other"
    )
    assert code == 1 and "reports/other/mera/seed-0: its run saw other data (0)" in text, text
    assert copy.artifacts() == before
