"""Working copies in which the real command line runs, and what tells how a run ended."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from graftline.data.build import build
from graftline.steps.supervised import start_child, stop_child

ROOT = Path(__file__).resolve().parents[2]
TIMES = (
    "wall_seconds", "computing_seconds", "merging_seconds", "training_seconds",
    "evaluating_seconds", "idle_seconds", "peak_rss_bytes", "step_seconds",
)  # fmt: skip
SIZES = {"train": 64, "validation": 16, "test": 16}
PAIR = ("--set", "order=[image,audio]")
"""The first two stages of the tiny recipe's four."""
TRAINED = ("align", "fine-tune", "merge", "realign")
NOT_BITS = {"timing.json"}  # how long it took


@dataclass
class Project:
    """A temporary working copy."""

    folder: Path
    api = None
    """URL of a Prefect server that stands for the user's own; without it each run starts one."""

    def environment(self) -> dict[str, str]:
        names = ("PREFECT_API_URL", "PREFECT_HOME", "MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID")
        kept = {name: value for name, value in os.environ.items() if name not in names}
        kept["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [kept.get("PYTHONPATH")])])
        kept["PREFECT_PROFILES_PATH"] = str(self.folder / "no-profiles.toml")
        kept["OMP_NUM_THREADS"] = "1"
        kept["COLUMNS"] = "120"
        return kept | ({"PREFECT_API_URL": self.api} if self.api else {})

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "flows.cli", *arguments],
            cwd=self.folder,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # a shell's background job would ignore SIGINT for good
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    def run(self, *arguments: str, seconds: float = 500) -> tuple[int, str]:
        process = self.start(*arguments)
        text, _ = process.communicate(timeout=seconds)
        return process.returncode, text

    def artifacts(self) -> dict[str, float]:
        """Published artifacts, and when each was published."""
        found = self.folder.glob("artifacts/[!.]*/[!.]*/manifest.json")
        return {str(path.parent.relative_to(self.folder)): path.stat().st_mtime for path in found}

    def wait_for_artifacts(self, count: int, process: subprocess.Popen[str]) -> None:
        deadline = time.monotonic() + 180
        while len(self.artifacts()) < count:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "the run makes no progress"
            time.sleep(0.02)

    def metrics(self, run: str = "mera/seed-0") -> dict[str, Any]:
        """The report of a run, without what no two runs share."""
        metrics = json.loads((self.folder / "reports/tiny" / run / "metrics.json").read_text())
        return {name: value for name, value in metrics.items() if name not in TIMES}

    def bits(self) -> dict[str, dict[str, str]]:
        """Artifact -> file -> sha256; see `bits_of`."""
        found = self.folder.glob("artifacts/[!.]*/[!.]*/manifest.json")
        return bits_of([json.loads(path.read_text()) for path in found])

    def scores(self, path: str) -> set[str]:
        """Rows of a report's scores.csv, but for what is asked at its last stage alone."""
        text = (self.folder / "reports/tiny" / path / "scores.csv").read_text()
        last = (",merged,", ",joint,")
        return {row for row in text.splitlines() if not any(word in row for word in last)}

    def mlflow(self, query: str) -> list[tuple[object, ...]]:
        return _query(self.folder / "mlruns" / "mlflow.db", query)

    def prefect(self, query: str) -> list[tuple[object, ...]]:
        return _query(self.folder / ".prefect" / "prefect.db", query)

    def processes(self) -> list[str]:
        """Commands of living processes that work in this copy."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if (entry / "cwd").resolve() == self.folder.resolve():
                    found.append((entry / "cmdline").read_text().replace("\0", " "))
            except OSError:
                continue
        return found

    def left_over(self, seconds: float = 30.0) -> list[str]:
        """Processes that are still there after a while."""
        deadline = time.monotonic() + seconds
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.1)
        return self.processes()


def bits_of(manifests: list[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """Artifact -> file -> sha256, of what must be the same everywhere."""
    return {
        f"{each['kind']}/{each['fingerprint']}": {
            name: entry["sha256"] for name, entry in each["files"].items() if name not in NOT_BITS
        }
        for each in manifests
    }


def assert_first_stages_of(finished: Project, pair: Project) -> None:
    """What a run of `PAIR` left is what the whole run has of these stages, bit by bit."""
    bits, expected = pair.bits(), finished.bits()
    # The merged model is asked at the last stage alone, which is another one in the whole run.
    own = sorted(name.split("/")[0] for name in bits.keys() - expected.keys())
    assert set(own) <= {"evaluate", "evaluate-joint", "perplexity"}, own
    shared = {name: files for name, files in bits.items() if name in expected}
    assert sum(name.split("/")[0] in TRAINED for name in shared) == 9
    assert shared == {name: expected[name] for name in shared}
    scores = pair.scores("mera/order-image-audio/seed-0")
    assert len(scores) > 8
    assert scores <= finished.scores("mera/seed-0")


def _query(path: Path, query: str) -> list[tuple[object, ...]]:
    connection = sqlite3.connect(path)
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


@pytest.fixture(scope="session")
def _served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The API of a Prefect server that lasts as long as the tests."""
    home = {"PREFECT_HOME": str(tmp_path_factory.mktemp("prefect"))}
    child = start_child(["-m", "tasks.server", "0"], home)
    assert child.stdout is not None
    port = child.stdout.readline().strip()
    assert child.stdout.readline().strip() == "ready"
    yield f"http://127.0.0.1:{port}/api"
    stop_child(child)


@pytest.fixture
def one_server(_served: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test's runs use one server that is there: starting one takes as long as a short run."""
    monkeypatch.setattr(Project, "api", _served)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A working copy in which the tiny recipe ran once. Tests copy it and leave it alone.

    Where tests run in several processes, the first one makes it for all.
    """
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    project = Project(root / "finished" / "project")
    project.api = None  # it starts its own server, and leaves that one's database
    output = project.folder / "output.txt"
    with FileLock(root / "finished.lock"):
        if not output.exists():
            project.folder.mkdir(parents=True)
            shutil.copytree(ROOT / "params", project.folder / "params")
            build(project.folder / "data", sizes=SIZES)
            code, text = project.run("run", "params/tiny.yaml")
            assert code == 0, text
            output.write_text(text)
    return project


@pytest.fixture
def copy(finished: Project, tmp_path: Path) -> Project:
    """A copy of the finished working copy."""
    folder = tmp_path / "project"
    shutil.copytree(finished.folder, folder)
    return Project(folder)


@pytest.fixture
def fresh(copy: Project) -> Project:
    """A working copy whose databases exist and in which nothing was computed."""
    for name in ("artifacts", "reports"):
        shutil.rmtree(copy.folder / name)
    return copy


@pytest.fixture(scope="session")
def used(finished: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished working copy, with media of test rows as files beside it."""
    from tests.flows.used import MODALITIES, medium, rows_of

    folder = tmp_path_factory.mktemp("used") / "project"
    shutil.copytree(finished.folder, folder)
    (folder / "media").mkdir()
    for modality in MODALITIES:
        for number, row in enumerate(rows_of(folder, modality)):
            (folder / medium(modality, number)).write_bytes(row["media"])
    return folder


@pytest.fixture
def in_used(used: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test runs in that copy."""
    monkeypatch.chdir(used)
    # MLflow keeps a client a URI: a relative one would be another test's
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{used}/mlruns/mlflow.db")


@pytest.fixture(scope="session")
def exported(used: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of exports: of one backbone, of masked weights, of whole experts, of adapters."""
    from flows import using
    from tests.flows.used import EXPORTED, QUIET, RECIPE, computed

    out = tmp_path_factory.mktemp("exported")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(used)
        for name, overrides in EXPORTED.items():
            computed(overrides)
            using.export(RECIPE, overrides, None, out / name, QUIET)
    return out
