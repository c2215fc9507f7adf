"""`dvc repro` and its companions on the repository's own dvc.yaml, with two tiny stages."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_server")]
ROOT = Path(__file__).resolve().parents[2]


class Copy:
    """A working copy under git and DVC, whose dvc.yaml names two stages of the tiny recipe."""

    def __init__(self, project) -> None:
        self.folder = project.folder
        self.environment = project.environment()
        self.environment["PATH"] = os.pathsep.join(
            [str(Path(sys.executable).parent), self.environment["PATH"]]
        )
        for name in ("flows", "graftline", "tasks"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, self.folder / name, ignore=ignored)
        for name in (".gitignore", ".dvcignore"):
            shutil.copy(ROOT / name, self.folder / name)
        text = (ROOT / "dvc.yaml").read_text().replace("starter", "tiny")
        (self.folder / "dvc.yaml").write_text(text)
        recipe = self.folder / "params/tiny.yaml"
        whole = recipe.read_text()
        two = whole.replace("order: [image, audio, video, point_cloud]", "order: [image, audio]")
        assert two != whole
        recipe.write_text(two)
        shutil.copytree(ROOT / ".dvc", self.folder / ".dvc", ignore=lambda *_: ["cache", "tmp"])
        self.run("git", "init", "--quiet")
        self.run("git", "config", "user.email", "tests@example.org")
        self.run("git", "config", "user.name", "tests")
        self.run("dvc", "add", "--quiet", "data")
        self.commit()

    def commit(self) -> None:
        self.run("git", "add", "--all")
        self.run("git", "commit", "--quiet", "--message", "a version")

    def read(self, *command: str) -> dict[str, Any]:
        """What a command prints as JSON; its warnings go elsewhere."""
        return json.loads(self.complete(*command).stdout)

    def run(self, *command: str) -> str:
        done = self.complete(*command)
        return done.stdout + done.stderr

    def complete(self, *command: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True,
            timeout=400, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}: {done.stdout[-2000:]} {done.stderr[-2000:]}"
        return done


def test_every_parameter_that_dvc_watches_is_in_the_recipe() -> None:
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    for stage in stages.values():
        for watched in stage["params"]:
            for file, keys in watched.items():
                assert set(keys) <= set(yaml.safe_load((ROOT / file).read_text())), file
                assert "methods" in keys, f"{file}: what was chosen for one method is a parameter"


def test_repro_metrics_plots_and_experiments(copy):
    project = Copy(copy)
    assert "Running stage 'mera'" in project.run("dvc", "repro", "mera", "finetune")
    again = project.run("dvc", "repro", "mera", "finetune")
    assert "Running stage" not in again and "didn't change" in again
    project.commit()
    shown = project.read("dvc", "metrics", "show", "--json")
    files = {f"reports/tiny/{method}/seed-0/headline.json" for method in ("mera", "finetune")}
    assert files <= set(shown[""]["data"])
    headline = shown[""]["data"]["reports/tiny/mera/seed-0/headline.json"]["data"]
    columns = {"brg", "frg", "retention", "joint", "perplexity", "scores"}
    assert {"joint", "perplexity", "scores"} <= set(headline) <= columns, "gains may be undefined"
    assert set(headline["scores"]) == {"image", "audio"}
    page = project.complete("dvc", "plots", "show").stdout.strip().removeprefix("file://")
    text = Path(page).read_text()
    assert "reports/tiny/mera/seed-0/scores.csv" in text and "stages.png" in text
    changes = ("replay.fraction=0.5", "fine_tune.learning_rate=0.003")  # the second moves numbers
    words = [word for each in changes for word in ("-S", f"params/tiny.yaml:{each}")]
    project.run("dvc", "exp", "run", *words, "mera")
    changed = project.read("dvc", "metrics", "diff", "--json")
    assert set(changed) == {"reports/tiny/mera/seed-0/headline.json"}
    values = yaml.safe_load((project.folder / "params/tiny.yaml").read_text())
    assert values["replay"]["fraction"] == 0.5 and values["fine_tune"]["learning_rate"] == 0.003


def test_data_and_reports_go_to_an_object_store_and_come_back(copy, tmp_path):
    pytest.importorskip("dvc_s3", reason="install graftline[s3] for this test")
    from tests.object_store import BUCKET, s3_server

    project = Copy(copy)
    report = project.folder / "reports" / "mine" / "scores.csv"
    report.parent.mkdir(parents=True)
    report.write_text("stage,score\n1,0.5\n")
    project.run("dvc", "add", "--quiet", "reports/mine")
    nothing = tmp_path / "no-aws-config"
    nothing.touch()
    with s3_server() as store:
        project.environment |= {**store, "AWS_CONFIG_FILE": str(nothing)}
        project.run("dvc", "remote", "add", "--default", "lab", f"s3://{BUCKET}/dvc")
        project.run("dvc", "remote", "modify", "lab", "endpointurl", store["AWS_ENDPOINT_URL"])
        project.commit()
        assert "pushed" in project.run("dvc", "push")
        project.run("git", "clone", "--quiet", ".", str(tmp_path / "clone"))
        before = {
            path.relative_to(project.folder): path.read_bytes()
            for folder in ("data", "reports/mine")
            for path in (project.folder / folder).rglob("*")
            if path.is_file() and path.name != ".gitignore"
        }
        project.folder = tmp_path / "clone"
        assert not (project.folder / "data").exists()
        project.run("dvc", "pull", "data", "reports/mine")
        assert len(before) > 12
        for path, content in before.items():
            assert (project.folder / path).read_bytes() == content, path
        words = [sys.executable, "-m", "flows.cli", "data", "verify"]
        assert "data is what data.dvc records" in project.run(*words)
