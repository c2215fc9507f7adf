"""One recipe on two workers: the same bits, whoever dies, and no secret where it can be read."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.cluster.conftest import PASSWORD, Lab, Machine, kill_group
from tests.cluster.seen import (
    ON_WORKERS,
    asked,
    checkpoints,
    published,
    runs_in,
    slots_taken,
    wait_for_free_slots,
)
from tests.flows.conftest import PAIR
from tests.object_store import KEYS

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(1800)]

OWN = ["--set", "data.rows={train: 63, validation: 16, test: 16}"]
"""Rows that no other test encodes."""
STEPS = {"killed": 150, "stopped": 151}
"""Of the fine-tuning that is interrupted: neither test finds the other's."""
RECIPE = ["run", "params/tiny.yaml", *PAIR, *OWN]


def test_two_workers_make_the_same_bits_as_one_machine(lab: Lab, alone: Machine) -> None:
    laptop = lab.machine("laptop")
    before, encoded = published(lab), _shares(lab)
    with lab.worker("one"), lab.worker("two"):
        process = laptop.start(*RECIPE, *ON_WORKERS, "--set", "execution.feature_shares=2")
        code, text = alone.run(*RECIPE)
        assert code == 0, text
        text, _ = process.communicate(timeout=1200)
        assert process.returncode == 0, text
    path = "mera/order-image-audio/seed-0"
    assert laptop.metrics(path) == alone.metrics(path)
    here, there = alone.bits(), published(lab)
    assert {name: there.get(name) for name in here} == here
    assert there.keys() - before.keys() == here.keys() - before.keys(), "nothing else"
    done = runs_in(lab, "COMPLETED")
    assert sum(run["name"].startswith("stage") for run in done) >= 6
    assert _shares(lab) - encoded == 4
    for name in ("one", "two"):
        assert list(lab.folder.glob(f"{name}-home/store/*/[!.]*/*/manifest.json")), name
    assert slots_taken(lab) == 0
    assert runs_in(lab, "RUNNING", "PENDING", "SCHEDULED") == []


def _shares(lab: Lab) -> int:
    """Shares of features that workers have encoded."""
    return sum("features, share" in run["name"] for run in runs_in(lab, "COMPLETED"))


@pytest.mark.parametrize("ending", ["killed", "stopped"])
def test_the_work_of_a_machine_that_ends_goes_to_another(lab: Lab, ending: str) -> None:
    laptop, crashed = lab.machine("laptop"), len(runs_in(lab, "CRASHED"))
    former = checkpoints(lab, "one", "two")
    with lab.worker("one") as one, lab.worker("two") as two:
        process = laptop.start(
            "run", "params/tiny.yaml", "--method", "finetune", "--seed", "1", *ON_WORKERS,
            "--set", "order=[image]", "--set", f"fine_tune.steps={STEPS[ending]}",
        )  # fmt: skip
        deadline = time.monotonic() + 400
        busy = None
        while busy is None:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "no worker starts the fine-tuning"
            time.sleep(0.2)
            busy = next((w for w in (one, two) if _trains(lab, w.pid, former)), None)
        if ending == "killed":
            kill_group(busy)
        else:
            busy.terminate()
            busy.wait(30)
            assert _group(busy.pid) == [], "what it started ended with it"
        text, _ = process.communicate(timeout=1000)
        assert process.returncode == 0, text
        assert "its machine is gone" in text
        assert laptop.metrics("finetune/order-image/seed-1")["scores"].keys() == {"image"}
        wait_for_free_slots(lab)
        assert runs_in(lab, "RUNNING", "PENDING", "SCHEDULED") == []
        assert len(runs_in(lab, "CRASHED")) == crashed + 1


def _group(leader: int) -> list[int]:
    """Processes of a worker's group that still run."""
    found = []
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            ended = process.status() == psutil.STATUS_ZOMBIE
            if not ended and os.getpgid(process.pid) == leader:
                found.append(process.pid)
    return found


def _trains(lab: Lab, leader: int, former: set[Path]) -> bool:
    """Whether a process of a worker's group has begun to leave checkpoints beside former ones."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (
                os.getpgid(int(entry.name)) == leader
                and b"prefect.engine" in (entry / "cmdline").read_bytes()
            ):
                home = Path((entry / "cwd").resolve()).name
                return bool(checkpoints(lab, home) - former)
        except OSError:
            continue
    return False


def test_deploying_again_changes_nothing(lab: Lab) -> None:
    def there() -> dict[str, Any]:
        found = {each["name"]: each for each in asked(lab, "deployments/filter", {})}
        pool = asked(lab, "work_pools/gpu")
        automations = asked(lab, "automations/filter", {})
        limit = asked(lab, "v2/concurrency_limits/gpu")
        return {
            "deployments": {name: (each["id"], each["parameters"]) for name, each in found.items()},
            "others": [
                pool["id"],
                limit["id"],
                limit["limit"],
                [each["id"] for each in automations],
            ],
        }

    before = there()
    names = {"version-data", "experts", "continual", "compose", "compare", "steps"}
    assert before["deployments"].keys() == names
    [continual] = [d for d in asked(lab, "deployments/filter", {}) if d["name"] == "continual"]
    form = continual["parameter_openapi_schema"]["properties"]
    assert form["recipe_path"]["type"] == "string"
    assert all(field["description"] for field in form.values())
    assert [schedule["active"] for schedule in continual["schedules"]] == [False]
    code, text = lab.machine("laptop").run("deploy")
    assert code == 0, text
    assert there() == before


def test_no_secret_is_written_down(lab: Lab) -> None:
    secrets = [PASSWORD, KEYS["AWS_SECRET_ACCESS_KEY"]]
    texts = {name: lab.dump(name) for name in ("prefect", "mlflow")}
    for log in lab.folder.glob("*.log"):
        texts[log.name] = log.read_text(errors="replace")
    for file in (lab.folder / "laptop").rglob("*"):
        if file.is_file() and file.suffix in (".json", ".jsonl", ".csv", ".log", ".yaml", ".md"):
            texts[str(file)] = file.read_text(errors="replace")
    assert len(texts["mlflow"]) > 10_000
    shown = [name for name, text in texts.items() for secret in secrets if secret in text]
    assert shown == []
