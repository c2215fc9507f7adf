"""Methods beyond MERA, run by the real command line on the stages that MERA left."""

from __future__ import annotations

import csv
import json

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_server")]

PAIR = ("--set", "order=[image,audio]", "--set", "distil.steps=4", "--set", "distil.samples=16")


def test_they_run_on_mera_s_stages_and_are_compared(copy):
    before = set(copy.artifacts())
    methods = "mera,mera+,mera-masks"
    code, text = copy.run("compare", "params/tiny.yaml", *PAIR, "--methods", methods)
    assert code == 0, text
    kinds = [name.split("/")[1] for name in set(copy.artifacts()) - before]
    assert not set(kinds) & {"align", "fine-tune", "merge"}  # those are MERA's
    # mera+ distils the old modality, and realigns the new one on all its rows
    expected = {"compose": 1, "statistics": 1, "distil": 1, "realign": 1, "realign-masked": 2}
    assert {kind: kinds.count(kind) for kind in expected} == expected
    table = (copy.folder / "reports/tiny/compare/table.csv").read_text()
    rows = {row["method"]: row for row in csv.DictReader(table.splitlines())}
    assert rows.keys() == {"mera", "mera+", "mera-masks"}
    assert (rows["mera+"]["replay_rows"], rows["mera"]["replay_rows"]) == ("0.0", "32.0")
    aliases = {alias for (alias,) in copy.mlflow("select alias from registered_model_aliases")}
    assert "mera-plus-image-audio" in aliases
    code, text = copy.run("export", "tiny@mera+-image-audio", "--out", "model", *PAIR)
    assert code == 0, text
    assert (copy.folder / "model/manifest.json").is_file()
    path = "reports/tiny/mera+/order-image-audio/seed-0/metrics.json"
    metrics = json.loads((copy.folder / path).read_text())
    # the random LLM may have learned nothing that could be kept; then that is what is said
    assert metrics["brg"] is not None or "brg" in metrics["undefined"]
    losses = copy.mlflow("select count(*) from metrics where key = 'loss.distil.image'")
    assert losses[0][0] == 4


def test_drift_is_predicted_and_compared_with_what_was_measured(copy):
    before = set(copy.artifacts())
    code, text = copy.run("drift", "params/tiny.yaml", "--samples", "8")
    assert code == 0, text
    table = (copy.folder / "reports/tiny/drift/mera-seed-0.csv").read_text()
    rows = list(csv.DictReader(table.splitlines()))
    assert [row["modality"] for row in rows] == ["image", "audio", "video", "point_cloud"]
    for row in rows:
        assert float(row["readings"]) > 0.0
        assert float(row["answers"]) > 0.0
        assert -1.0 <= float(row["gain"]) <= 1.0
    added = {name.split("/")[1] for name in set(copy.artifacts()) - before}
    assert added == {"statistics"}  # nothing is trained or asked
    code, text = copy.run("drift", "params/tiny.yaml", "--method", "finetune")
    assert code == 1
    assert "choose --method mera" in text
