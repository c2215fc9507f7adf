"""`graftline ui`: both pages on loopback, and nothing left when it is told to stop."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Iterator

import pytest

from tests.flows.conftest import Project

pytestmark = pytest.mark.slow


def _read(url: str, content: dict[str, object] | None = None) -> str:
    data = None if content is None else json.dumps(content).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.status == 200
        return answer.read().decode()


@pytest.fixture
def served(copy: Project) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """The running command, and where it says that MLflow and Prefect are."""
    process = copy.start("ui", "--mlflow-port", "0", "--prefect-port", "0")
    try:
        text = ""
        while "Ctrl-C stops" not in text:
            line = process.stdout.readline()
            assert line, text
            text += line
        mlflow, prefect = re.findall(r"(?:MLflow|Prefect): +(http://127\.0\.0\.1:\d+)", text)
        yield process, mlflow, prefect
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)


def test_both_pages_are_served_until_ctrl_c(copy: Project, served) -> None:
    process, mlflow, prefect = served
    assert "<html" in _read(mlflow) and "<html" in _read(prefect)
    found = json.loads(_read(f"{mlflow}/api/2.0/mlflow/experiments/search?max_results=10"))
    assert "tiny" in [each["name"] for each in found["experiments"]]
    runs = json.loads(_read(f"{prefect}/api/flow_runs/filter", {"limit": 5}))
    assert {run["state_type"] for run in runs} == {"COMPLETED"}
    for _ in range(1000):  # more lines of a log of requests than a pipe holds
        _read(f"{mlflow}/health")
    process.send_signal(signal.SIGINT)
    process.wait(60)
    assert "Traceback" not in process.stdout.read()
    assert copy.left_over() == []
    for url in (mlflow, prefect):
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", int(url.rpartition(":")[2]))) != 0


def test_a_tracking_server_elsewhere_is_named_and_not_started_again(
    copy: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = {"MLFLOW_TRACKING_URI": "http://me:secret@tracking.invalid:5000"}
    surroundings = copy.environment() | elsewhere
    monkeypatch.setattr(Project, "environment", lambda _: surroundings)
    process = copy.start("ui", "--mlflow-port", "0", "--prefect-port", "0")
    try:
        lines = [process.stdout.readline() for _ in range(3)]
        assert lines[0].split() == ["MLflow:", "http://tracking.invalid:5000"]
        assert "Prefect: http://127.0.0.1" in lines[1]
    finally:
        process.send_signal(signal.SIGINT)
        text = process.communicate(timeout=60)[0]
    assert "secret" not in "".join([*lines, text])
    assert copy.left_over() == []
