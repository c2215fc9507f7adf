"""A server that is away for half a minute costs a run nothing but time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from mlflow import MlflowClient

from tests.cluster.conftest import Lab, Machine
from tests.cluster.seen import ON_WORKERS, checkpoints, runs_in, wait_for_free_slots
from tests.flows.conftest import TIMES

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(1800)]

AWAY_SECONDS = 30.0
SERVERS = ("prefect", "mlflow", "postgres", "store")
STEPS = 400
"""A fine-tuning long enough to see a server go and come back."""


def recipe(seed: int) -> list[str]:
    return [
        "run", "params/tiny.yaml", "--method", "finetune", "--seed", str(seed),
        "--set", "order=[image]", "--set", f"fine_tune.steps={STEPS}",
    ]  # fmt: skip


def points(address: str, name: str) -> dict[tuple[str, str], list[tuple[int, float]]]:
    """All that MLflow knows of a run and its stages: (run, metric) -> (step, value), in order."""
    client = MlflowClient(tracking_uri=address)
    ids = [each.experiment_id for each in client.search_experiments()]
    [parent] = client.search_runs(ids, f"attributes.run_name = '{name}'")
    children = client.search_runs(ids, f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    found = {}
    for run in (parent, *children):
        assert run.info.status == "FINISHED", run.info.run_name
        for metric in run.data.metrics:
            history = client.get_metric_history(run.info.run_id, metric)
            kept = [(point.step, 0.0 if _is_time(metric) else point.value) for point in history]
            found[run.info.run_name, metric] = sorted(kept)
    return found


def _is_time(metric: str) -> bool:
    return metric in TIMES or "second" in metric or "bytes" in metric


@pytest.fixture
def workers(lab: Lab) -> Iterator[set[str]]:
    with lab.worker("one"), lab.worker("two"):
        yield {"one", "two"}


@pytest.mark.parametrize(("seed", "name"), list(enumerate(SERVERS, 10)), ids=SERVERS)
def test_a_server_that_is_away_costs_nothing(
    lab: Lab, alone: Machine, workers: set[str], seed: int, name: str
) -> None:
    laptop, server = lab.machine("laptop"), lab.servers[name]
    before = checkpoints(lab, *workers)
    process = laptop.start(*recipe(seed), *ON_WORKERS)
    deadline = time.monotonic() + 400
    while checkpoints(lab, *workers) <= before:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "no worker starts the fine-tuning"
        time.sleep(0.2)
    server.stop()
    time.sleep(AWAY_SECONDS)
    server.start()
    code, text = alone.run(*recipe(seed))
    assert code == 0, text
    text, _ = process.communicate(timeout=800)
    assert process.returncode == 0, text
    path = f"finetune/order-image/seed-{seed}"
    assert laptop.metrics(path) == alone.metrics(path)
    called = f"finetune seed {seed}, image"
    told = points(lab.environment["MLFLOW_TRACKING_URI"], called)
    expected: dict[Any, Any] = points(f"sqlite:///{alone.folder}/mlruns/mlflow.db", called)
    assert told == expected
    wait_for_free_slots(lab)
    assert runs_in(lab, "RUNNING", "PENDING", "SCHEDULED") == []
