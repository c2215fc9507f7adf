"""A tracking server that is away: no call fails, and each arrives once, in order, afterwards."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Experiment

from graftline.settings.reading import load_recipe
from tasks import mlflow_calls, tracking
from tasks.journal import PROMISED, Away, Journal, Refused
from tasks.references import DataVersion
from tasks.ui import free_port

TINY = Path(__file__).resolve().parents[2] / "params/tiny.yaml"


class Server:
    """Remembers what it was told, while it is there."""

    def __init__(self) -> None:
        self.there = True
        self.told: list[tuple[str, dict[str, Any]]] = []

    def perform(self, operation: str, arguments: Mapping[str, Any]) -> str:
        if not self.there:
            raise Away("asleep")
        if operation == "wrong":
            raise Refused("no such thing")
        self.told.append((operation, dict(arguments)))
        return f"id-{len(self.told)}"


def _later(journal: Journal) -> None:
    journal._tried = 0.0


def test_calls_wait_and_arrive_once_in_order(tmp_path: Path) -> None:
    server = Server()
    journal = Journal(tmp_path / "journal.jsonl", server.perform)
    assert journal.call("run", name="a") == "id-1"
    assert list(tmp_path.iterdir()) == [], "as long as the server answers, nothing is kept"
    server.there = False
    run = journal.call("run", name="b")
    assert run.startswith(PROMISED)
    child = journal.call("run", name="c", tags={"parent": run})
    journal.call("wrong")
    journal.call("log", run_id=child, metrics=[["loss", 1.0, 5, 1]])
    server.there = True
    another = Journal(tmp_path / "journal.jsonl", server.perform)  # of the next process
    assert another.deliver()
    assert server.told[1:] == [
        ("run", {"name": "b"}),
        ("run", {"name": "c", "tags": {"parent": "id-2"}}),
        ("log", {"run_id": "id-3", "metrics": [["loss", 1.0, 5, 1]]}),
    ]
    journal.call("log", run_id=child)  # who was promised an id may keep using it
    assert server.told[-1] == ("log", {"run_id": "id-3"})
    assert another.deliver() and len(server.told) == 5


def test_a_delivery_that_is_cut_off_goes_on(tmp_path: Path) -> None:
    server = Server()
    journal = Journal(tmp_path / "journal.jsonl", server.perform)
    server.there = False
    for number in range(4):
        journal.call("log", step=number)
    assert not journal.deliver()

    def twice(operation: str, arguments: Mapping[str, Any]) -> str:
        if len(server.told) == 2:
            raise Away("asleep again")
        return server.perform(operation, arguments)

    server.there = True
    assert not Journal(tmp_path / "journal.jsonl", twice).deliver()
    with (tmp_path / "journal.jsonl").open("a") as file:
        file.write('{"id": "journal-x", "operation": "lo')  # a kill in the middle of a write
    _later(journal)
    journal.call("log", step=4)
    assert [arguments["step"] for _, arguments in server.told] == [0, 1, 2, 3, 4]
    assert not (tmp_path / "journal.jsonl").exists()


def test_what_follows_a_cut_off_call_is_not_lost_with_it(tmp_path: Path) -> None:
    server = Server()
    server.there = False
    (tmp_path / "journal.jsonl").write_text('{"id": "journal-x", "operation": "lo')
    journal = Journal(tmp_path / "journal.jsonl", server.perform)
    run = journal.call("run", name="a")
    server.there = True
    _later(journal)
    journal.call("log", run_id=run)
    assert server.told == [("run", {"name": "a"}), ("log", {"run_id": "id-1"})]


def test_who_ends_waits_for_a_server_that_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server()
    journal = Journal(tmp_path / "journal.jsonl", server.perform)
    assert journal.deliver_within(60.0), "nothing is due"
    server.there = False
    journal.call("end")
    assert not journal.deliver_within(0.0)
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        server.there = len(slept) == 3

    monkeypatch.setattr("tasks.journal.time.sleep", sleep)
    assert journal.deliver_within(60.0)
    assert server.told == [("end", {})] and len(slept) == 3


@contextmanager
def _mlflow(database: Path, port: int) -> Iterator[None]:
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port),
        "--backend-store-uri", f"sqlite:///{database}", "--workers", "1",
        "--artifacts-destination", str(database.with_name("files")),
    ]  # fmt: skip
    server = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=database.parent,
        start_new_session=True,
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                    break
            except OSError:
                assert server.poll() is None, "MLflow's server ended"
                time.sleep(0.2)
        yield
    finally:
        os.killpg(server.pid, signal.SIGKILL)  # MLflow has workers of its own
        server.wait()


@pytest.mark.slow
def test_mlflow_learns_what_it_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    port, database = free_port(), tmp_path / "server.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(tracking, "_LAST_SECONDS", 0.0)
    recipe, data = load_recipe(TINY), DataVersion("data", "0" * 32, {}, "data.dvc")
    report = tmp_path / "metrics.json"
    report.write_text("{}")
    with _mlflow(database, port):
        with tracking.tracked_run(recipe, "before", "f0", data, {}) as tracked:
            tracking.log_numbers(tracked.run_id, tracked.uri, {"BRG": 1.0}, 1)
    assert not list((tmp_path / "mlruns").glob("journal-*.jsonl"))
    with tracking.tracked_run(recipe, "mera seed 0", "f1", data, {}) as tracked:
        child = tracking.stage_run(tracked, 1)
        for step in (1, 2, 3):
            tracking.log_numbers(child, tracked.uri, {"BRG": 90.0 + step}, step)
        model = tracking.log_model(tracked, child, "tiny", "/x", {"a": "b"}, {"BRG": 9.0}, 1)
        tags = {"method": "mera", "fingerprint": "f1"}
        tracking.register("tiny", model, tracked.run_id, "mera", tags)
        tracking.log_files(tracked, [report])
    [journal] = (tmp_path / "mlruns").glob("journal-*.jsonl")
    assert json.loads(journal.read_text().splitlines()[0])["operation"] == "create_experiment"
    text = journal.read_text()
    with _mlflow(database, port):
        assert tracking.deliver()
        journal.write_text(text)  # who dies before a delivery is noted tells once more
        journal.with_suffix(".answers").unlink()
        assert tracking.deliver()
    rows = sqlite3.connect(database)
    runs = rows.execute("select name, status from runs order by start_time").fetchall()
    assert runs == [
        ("before", "FINISHED"),
        ("mera seed 0", "FINISHED"),
        ("stage 1: image", "FINISHED"),
    ]
    numbers = rows.execute(
        "select step, value from metrics join runs using (run_uuid) "
        "where runs.name = 'stage 1: image' and value > 50 order by step"
    )
    assert numbers.fetchall() == [(1, 91.0), (2, 92.0), (3, 93.0)]
    alias = rows.execute("select name, alias, version from registered_model_aliases").fetchall()
    assert alias == [("tiny", "mera", 1)]
    rows.close()
    assert list((tmp_path / "files").rglob("metrics.json"))


def test_a_deleted_experiment_is_restored(tmp_path: Path) -> None:
    """MLflow finds it by its name and takes no run for it."""
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    made = mlflow_calls.create_experiment(client, "tiny", tmp_path.as_uri())
    client.delete_experiment(made)
    assert mlflow_calls.create_experiment(client, "tiny", None) == made
    mlflow_calls.create_run(client, made, {}, 0)


@pytest.mark.slow
def test_who_loses_a_race_finds_what_the_other_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    port, database = free_port(), tmp_path / "server.db"
    looked: list[str] = []

    class Loser(MlflowClient):
        """Looks for an experiment just before another run makes it."""

        def get_experiment_by_name(self, name: str) -> Experiment | None:
            looked.append(name)
            return super().get_experiment_by_name(name) if len(looked) > 1 else None

    with _mlflow(database, port):
        uri = f"http://127.0.0.1:{port}"
        made = MlflowClient(uri).create_experiment("tiny")
        arguments = {"name": "tiny", "location": None}
        assert mlflow_calls.perform(Loser(uri), "create_experiment", arguments) == made
        with pytest.raises(Refused, match="nobody"):
            mlflow_calls.perform(MlflowClient(uri), "log", {"run_id": "nobody", "tags": {"a": "b"}})
    assert looked == ["tiny", "tiny"]
