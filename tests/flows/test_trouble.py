"""Several runs at once, and a disk that fills up: nothing is lost, nothing is broken."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.flows.conftest import PAIR, assert_first_stages_of

pytestmark = pytest.mark.slow


def test_two_runs_at_once_end_in_one_result(fresh, finished):
    both = [fresh.start("run", "params/tiny.yaml", *PAIR) for _ in range(2)]
    for process in both:
        text, _ = process.communicate(timeout=400)
        assert process.returncode == 0, text
        assert "Traceback" not in text
    assert_first_stages_of(finished, fresh)
    runs = fresh.mlflow("select status from runs where name like 'mera seed 0%'")
    assert {status for (status,) in runs} == {"FINISHED"}
    assert not list((fresh.folder / "artifacts/.runs").iterdir())
    assert fresh.left_over() == []


@pytest.fixture
def small_disk(fresh):
    """A file system of its own for the artifacts, where that is allowed."""
    store = fresh.folder / "artifacts"
    store.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=900m", "tmpfs", str(store)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("no file system can be mounted here")
    yield store
    subprocess.run(["umount", "--lazy", str(store)], check=True)


def fill(store: Path) -> Path:
    """Takes what is left of the file system."""
    filler = store / "filler"
    with filler.open("wb", buffering=0) as stream:
        try:
            while True:
                stream.write(bytes(1 << 16))
        except OSError:
            return filler


@pytest.mark.usefixtures("one_server")
def test_a_disk_that_fills_up_stops_the_run_and_loses_nothing(small_disk, fresh, finished):
    process = fresh.start("run", "params/tiny.yaml", *PAIR)
    fresh.wait_for_artifacts(3, process)
    filler = fill(small_disk)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 1, text
    assert "Traceback" not in text
    assert "No space left" in text.replace("\n", " ")
    done = fresh.artifacts()
    filler.unlink()
    code, text = fresh.run("run", "params/tiny.yaml", *PAIR)
    assert code == 0, text
    after = fresh.artifacts()
    assert {name: after[name] for name in done} == done
    assert_first_stages_of(finished, fresh)
    assert fresh.left_over() == []
