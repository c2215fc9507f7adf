"""Machines that are switched off again and again: the run ends by itself, with the same bits.

Three times by default; GRAFTLINE_KILLS=20 takes the better part of an hour.
"""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.cluster.conftest import Lab, Machine, kill_group
from tests.cluster.seen import ON_WORKERS, published, runs_in, wait_for_free_slots
from tests.flows.conftest import PAIR

KILLS = int(os.environ.get("GRAFTLINE_KILLS", "3"))
A_RUN = 5
"""Kills that one run has to bear."""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.cluster,
    pytest.mark.timeout(300 + 400 * min(KILLS, A_RUN)),
]


def recipe(seed: int) -> list[str]:
    return ["run", "params/tiny.yaml", "--seed", str(seed), *PAIR, "--set", "fine_tune.steps=60"]


def carried(worker: subprocess.Popen[bytes]) -> str | None:
    """The flow run that a worker carries out now."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(entry.name)) == worker.pid:
                for line in (entry / "environ").read_bytes().split(b"\0"):
                    name, _, value = line.decode().partition("=")
                    if name == "PREFECT__FLOW_RUN_ID":
                        return value
        except (OSError, UnicodeDecodeError):
            continue
    return None


def titles(lab: Lab) -> Mapping[str, str]:
    return {each["id"]: each["name"] for each in runs_in(lab, "PENDING", "RUNNING")}


@pytest.mark.parametrize("first", range(0, KILLS, A_RUN))
def test_machines_are_switched_off_at_any_moment(
    lab: Lab, alone: Machine, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed, moments = 100 + first, random.Random(first)
    laptop = lab.machine("laptop")
    code, text = alone.run(*recipe(seed))
    assert code == 0, text
    killed = []
    with ExitStack() as stack:
        workers = {name: stack.enter_context(lab.worker(name)) for name in ("one", "two")}
        process = laptop.start(*recipe(seed), *ON_WORKERS)
        for _ in range(min(A_RUN, KILLS - first)):
            time.sleep(moments.uniform(5.0, 25.0))
            deadline, names = time.monotonic() + 200, []
            while not names and process.poll() is None:
                assert time.monotonic() < deadline, "no worker takes anything"
                time.sleep(0.2)
                names = [name for name, worker in workers.items() if carried(worker)]
            if not names:
                break  # the run is over
            name = moments.choice(names)
            killed.append(titles(lab).get(carried(workers[name]) or "", "between two"))
            kill_group(workers[name])
            workers[name] = stack.enter_context(lab.worker(name))  # it is switched on again
        text, _ = process.communicate(timeout=300 + 150 * A_RUN)
        assert process.returncode == 0, f"{killed}: {text}"
        wait_for_free_slots(lab, 180.0)
    print(f"switched off during: {killed}")
    path = f"mera/order-image-audio/seed-{seed}"
    assert laptop.metrics(path) == alone.metrics(path), killed
    here, there = alone.bits(), published(lab, monkeypatch)
    assert {name: there.get(name) for name in here} == here, killed
    assert runs_in(lab, "RUNNING", "PENDING", "SCHEDULED") == []
