"""Children that end with their parent, records of dead runs, ending by a signal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from graftline.durable import process_runs
from graftline.steps.supervised import start_child, stop_child
from tasks.interruption import MESSAGE
from tasks.records import dead_runs, recorded_run
from tasks.server import configured_url

ROOT = Path(__file__).resolve().parents[2]
CHILD = "import sys, time; print('up', flush=True); "
CHILD += "from graftline.steps.supervised import when_parent_ends; "
CHILD += "when_parent_ends(lambda: None, 0.1); time.sleep(60)"


def _gone(pid: int, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while process_runs(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not process_runs(pid)


def test_child_is_stopped():
    child = start_child(["-c", CHILD])
    assert child.stdout is not None
    assert child.stdout.readline() == "up\n"
    stop_child(child)
    assert child.poll() is not None


def test_a_child_finds_the_package_and_not_its_rooms_as_packages(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    child = start_child(["-c", "import json, sys; print(json.dumps(sys.path))"])
    assert child.stdout is not None
    paths = json.loads(child.stdout.readline())
    stop_child(child)
    assert str(ROOT) in paths
    assert str(ROOT / "graftline") not in paths


def test_child_ends_when_its_parent_is_killed():
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import time; from graftline.steps.supervised import start_child; "
            f"child = start_child(['-c', {CHILD!r}]); child.stdout.readline(); "
            "print(child.pid, flush=True); time.sleep(60)",
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert process_runs(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert _gone(pid)


def test_records_of_living_runs_stay(tmp_path):
    with recorded_run(tmp_path) as record:
        record.note(mlflow_run="abc")
        [path] = (tmp_path / ".runs").glob("*.json")
        assert json.loads(path.read_text())["pid"] == os.getpid()
        assert list(dead_runs(tmp_path)) == []
    assert list((tmp_path / ".runs").iterdir()) == []


def test_records_of_dead_runs_are_handed_out_once(tmp_path, monkeypatch):
    code = (
        "import os, sys; from tasks.records import recorded_run\n"
        "with recorded_run(sys.argv[1]) as record:\n"
        "    record.note(mlflow_run='abc'); os.kill(os.getpid(), 9)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, check=False)
    monkeypatch.chdir(tmp_path)
    assert list(dead_runs(tmp_path)) == [], "another project's: its own databases know it"
    monkeypatch.undo()
    [record] = list(dead_runs(tmp_path))
    assert record["mlflow_run"] == "abc"
    assert list(dead_runs(tmp_path)) == []


STOPPED = """
import sys, threading, time
from tasks.interruption import closed_when_stopped
def compute():
    while True:
        time.sleep(0.01)
threading.Thread(target=compute).start()  # not a daemon: it would keep the process alive
with closed_when_stopped(lambda: print("books closed", flush=True)):
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_process_whose_threads_compute(number):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(
        [sys.executable, "-c", STOPPED],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    child.send_signal(number)
    output, errors = child.communicate(timeout=30)
    assert child.returncode == 128 + number
    assert output == "books closed\n"
    assert MESSAGE in errors
    assert "Traceback" not in errors


def test_books_that_do_not_close_do_not_hold_the_process():
    code = STOPPED.replace('print("books closed", flush=True)', "time.sleep(60)")
    code = "import tasks.interruption as i; i._BOOKS_SECONDS = 0.2\n" + code
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    child.terminate()
    child.communicate(timeout=30)
    assert child.returncode == 128 + signal.SIGTERM


def test_configured_server_wins(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", "http://example.test/api")
    assert configured_url() == "http://example.test/api"
    monkeypatch.delenv("PREFECT_API_URL")
    profiles = tmp_path / "profiles.toml"
    monkeypatch.setenv("PREFECT_PROFILES_PATH", str(profiles))
    monkeypatch.delenv("PREFECT_PROFILE", raising=False)
    assert configured_url() is None
    profiles.write_text('active = "a"\n[profiles.a]\nPREFECT_API_URL = "http://b.test/api"\n')
    assert configured_url() == "http://b.test/api"
