"""`graftline compare` on the tiny recipe: methods in two orders, resumed, with its page."""

from __future__ import annotations

import csv
import json

import pytest

pytestmark = pytest.mark.slow

PAIR = ("--set", "order=[image,audio]", "--methods", "mera,connector-only", "--orders", "latin")


def test_methods_are_compared_and_nothing_is_computed_twice(copy):
    usual = copy.folder / "reports/tiny/mera/seed-0/metrics.json"
    content = usual.read_bytes()
    code, text = copy.run("compare", "params/tiny.yaml", *PAIR, "--budget")
    assert code == 0, text
    # of mera's four stages those of the usual order's beginning are there, and audio's first
    assert "4 runs; prefix tree of the orders, for one method and seed: 4 stages" in text
    assert "stages: 3 of 8 are cached, 5 must run" in text
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
            assert 0.0 < metrics["idle_seconds"] < metrics["wall_seconds"]
            assert metrics["training_seconds"] < metrics["computing_seconds"]
    rows = {row["method"]: row for row in csv.DictReader((folder / "table.csv").open())}
    backbone, connector = 1_000, 1_000
    mera, alone = rows["mera"], rows["connector-only"]
    assert float(mera["trained_parameters"]) > float(alone["trained_parameters"]) > connector
    assert float(mera["trained_parameters"]) > backbone
    # a connector is float32, and nothing else is kept beside one backbone
    assert float(alone["stored_bytes_per_modality"]) == 4 * float(alone["trained_parameters"])
    assert mera["stored_bytes_per_modality"] == alone["stored_bytes_per_modality"]
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
