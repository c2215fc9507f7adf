"""Machines that are switched off in every phase of their work: runs end by themselves, same bits.

Each phase once by default; GRAFTLINE_KILLS=21 switches off three times in each.
"""

from __future__ import annotations

import logging
import os
import random
import re
import subprocess
import threading
import time
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.cluster.conftest import Lab, Machine, kill_group
from tests.cluster.seen import (
    ON_WORKERS,
    computed_by,
    half_published,
    holds,
    published,
    runs_in,
    sent_steps,
    wait_for_free_slots,
)
from tests.flows.conftest import PAIR

LONGEST = {
    "features": 1.0, "align": 0.3, "fine-tune": 2.0, "merge": 0.02, "realign": 0.3, "evaluate": 0.3
}  # fmt: skip
"""Seconds within which a machine is switched off after it began to compute."""
PHASES = (*LONGEST, "publish")
KILLS = int(os.environ.get("GRAFTLINE_KILLS", "7"))
MACHINES = ("one", "two", "three")
AT_ONCE = 2
RUNS = 3 + KILLS // 4
"""Most runs; each has one merge and few moments of publishing."""
BORNE = 2
"""Kills of the same steps, which are sent four times at most."""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.cluster,
    pytest.mark.timeout(900 + 150 * KILLS),
]


def recipe(seed: int) -> list[str]:
    """Each seed has rows of its own, so that its media are encoded, too."""
    rows = f"data.rows={{train: {seed - 60}, validation: 16, test: 16}}"
    changes = ["--set", "fine_tune.steps=60", "--set", rows]
    return ["run", "params/tiny.yaml", "--seed", str(seed), *PAIR, *changes]


SHARES = ["--set", "execution.feature_shares=2"]


class Fleet:
    """Machines that work, each switched on again after it was switched off.

    Attributes:
        killed: (phase, kind of step) of each machine that was switched off in the middle of it.
        late: the same of those whose step was published a moment before.
    """

    def __init__(self, lab: Lab, stack: ExitStack) -> None:
        self._lab, self._stack = lab, stack
        self._moments = random.Random(0)
        self._workers = {name: stack.enter_context(lab.worker(name)) for name in MACHINES}
        self._sent: Counter[str] = Counter()
        self._off: list[str] = []
        self._lock = threading.Lock()
        self.killed: list[tuple[str, str]] = []
        self.late: list[tuple[str, str]] = []

    def wanted(self) -> list[str]:
        """Phases in which machines are still to be switched off."""
        done = Counter(phase for phase, _ in self.killed)
        each = -(-KILLS // len(PHASES))
        return [phase for phase in PHASES if done[phase] < each]

    def look(self) -> None:
        """Switches machines on again, and one off if it has begun what is wanted."""
        while self._off:  # from this thread: a worker ends with the thread that started it
            name = self._off.pop()
            self._workers[name] = self._stack.enter_context(self._lab.worker(name))
        wanted = self.wanted()
        for name, worker in self._workers.items():
            for artifact in computed_by(self._lab, name, worker):
                kind = artifact.partition("/")[0]
                if kind in wanted and kind in LONGEST:
                    time.sleep(self._moments.uniform(0.0, LONGEST[kind]))
                    self.switch_off(name, kind, artifact)
                    return

    def uploading(self, artifact: str) -> None:
        """Switches off the machine that uploads an artifact's parts: it never gets the answer."""
        if "publish" not in self.wanted():
            return
        for name, worker in self._workers.items():
            if artifact in computed_by(self._lab, name, worker):
                self.switch_off(name, "publish", artifact)

    def switch_off(self, name: str, phase: str, artifact: str) -> None:
        with self._lock:
            worker = self._workers[name]
            run = carried(worker)
            steps = sent_steps(self._lab, run) if run else None
            if steps is None or self._sent[steps] >= BORNE or phase not in self.wanted():
                return
            kill_group(worker)
            self._sent[steps] += 1
            late = holds(self._lab, artifact)
            (self.late if late else self.killed).append((phase, artifact.partition("/")[0]))
            self._off.append(name)


class Uploads(logging.Handler):
    """Hears of each part that reaches the object store before its sender does."""

    def __init__(self, fleet: Fleet) -> None:
        super().__init__()
        self._fleet = fleet

    def createLock(self) -> None:
        """None: who is switched off is looked up in the store, whose requests are heard, too."""
        self.lock = None

    def emit(self, record: logging.LogRecord) -> None:
        found = re.search(r"PUT /lab/artifacts/([a-z]\S*)/parts/", record.getMessage())
        if found:
            self._fleet.uploading(found[1])


def carried(worker: subprocess.Popen[bytes]) -> str | None:
    """The flow run that a worker carries out now."""
    for pid in group_of(worker):
        with suppress(OSError, UnicodeDecodeError):
            for line in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                name, _, value = line.decode().partition("=")
                if name == "PREFECT__FLOW_RUN_ID":
                    return value
    return None


def group_of(worker: subprocess.Popen[bytes]) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if os.getpgid(int(entry.name)) == worker.pid:
                found.append(int(entry.name))
    return found


def test_machines_are_switched_off_in_every_phase(lab: Lab, alone: Machine) -> None:
    laptop = lab.machine("laptop")
    runs: dict[int, subprocess.Popen[str]] = {}
    with ExitStack() as stack:
        fleet = Fleet(lab, stack)
        requests = logging.getLogger("werkzeug")
        handler, before = Uploads(fleet), requests.level
        requests.addHandler(handler)
        requests.setLevel(logging.INFO)
        stack.callback(requests.setLevel, before)
        stack.callback(requests.removeHandler, handler)
        while True:
            going = [seed for seed, process in runs.items() if process.poll() is None]
            if fleet.wanted() and len(going) < AT_ONCE and len(runs) < RUNS:
                seed = 100 + len(runs)
                runs[seed] = laptop.start(*recipe(seed), *ON_WORKERS, *SHARES)
            elif not going:
                break
            count = len(fleet.killed) + len(fleet.late)
            fleet.look()
            if len(fleet.killed) + len(fleet.late) > count:
                assert half_published(lab) == []
            time.sleep(0.01)
        print(f"switched off: {fleet.killed}; a moment too late: {fleet.late}; {len(runs)} runs")
        for seed, process in runs.items():
            text, _ = process.communicate(timeout=10)
            assert process.returncode == 0, f"{seed}: {fleet.killed}: {text}"
        wait_for_free_slots(lab, 180.0)
    assert fleet.wanted() == [], f"never caught in time; too late: {fleet.late}"
    assert runs_in(lab, "RUNNING", "PENDING", "SCHEDULED") == []
    for seed in runs:
        code, text = alone.run(*recipe(seed))
        assert code == 0, text
        path = f"mera/order-image-audio/seed-{seed}"
        assert laptop.metrics(path) == alone.metrics(path), seed
    here, there = alone.bits(), published(lab)
    assert {name: there.get(name) for name in here} == here
