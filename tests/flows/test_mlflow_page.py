"""MLflow's own page, opened in headless Chromium: it draws two methods side by side."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from urllib.parse import quote

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
]


def page(url: str, profile: str) -> str:
    """The DOM after the page's scripts have run."""
    arguments = [
        "--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1500,1000",
        f"--user-data-dir={profile}", "--virtual-time-budget=60000", "--dump-dom", url,
    ]  # fmt: skip
    done = subprocess.run([CHROMIUM, *arguments], capture_output=True, text=True, timeout=180)
    return done.stdout


@pytest.fixture
def address(copy, one_server):
    """Where `graftline ui` serves the MLflow of a working copy with two methods' runs."""
    methods = ("--set", "order=[image,audio,video]", "--methods", "mera,finetune")
    code, text = copy.run("compare", "params/tiny.yaml", *methods)
    assert code == 0, text
    process = copy.start("ui", "--mlflow-port", "0", "--prefect-port", "0")
    lines = []
    while not (found := re.search(r"MLflow:\s+(http://127.0.0.1:\d+)", "".join(lines))):
        line = process.stdout.readline()
        assert line, "".join(lines)
        lines.append(line)
    yield found[1]
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert copy.left_over() == []


def test_brg_and_scores_of_two_methods_are_drawn_over_stages(copy, address, tmp_path):
    names = [
        f"{method} {run}"
        for method in ("mera", "finetune")
        for run in ("seed 0, image audio video", "over 1 run(s)")
    ]
    rows = copy.mlflow("select name, run_uuid, experiment_id from runs order by name")
    runs = {name: run for name, run, _ in rows}
    chosen = quote(json.dumps([runs[name] for name in names]))
    experiment = quote(json.dumps([str(rows[0][2])]))
    metrics = quote(json.dumps(["score.image", "BRG"]))
    url = (
        f"{address}/#/metric?runs={chosen}&experiments={experiment}&metric=%22BRG%22"
        f"&plot_metric_keys={metrics}&plot_layout=%7B%22autosize%22%3Atrue%7D&x_axis=step"
    )
    dom = page(url, os.fspath(tmp_path))
    for name in names:
        for metric in ("score.image", "BRG"):
            assert f"{name} ({metric})" in dom
    assert len(re.findall('class="js-line"', dom)) >= 8
    assert "Error while loading" not in dom
