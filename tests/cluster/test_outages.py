"""A server that is away for half a minute costs a run nothing but time."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping
from typing import Any

import pytest
from mlflow import MlflowClient

from tests.cluster.conftest import Lab, Machine
from tests.cluster.seen import ON_WORKERS, computed_by, runs_in, wait_for_free_slots
from tests.flows.conftest import TIMES

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(1800)]

AWAY_SECONDS = 30.0
SERVERS = ("prefect", "mlflow", "postgres", "store")
STEPS = 800
"""A fine-tuning long enough to see servers go and come back."""


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


def is_fine_tuning(lab: Lab, workers: Mapping[str, subprocess.Popen[bytes]]) -> bool:
    """Whether a worker is in the middle of a fine-tuning: it has left a checkpoint."""
    return any(
        list(
            lab.folder.glob(f"{name}-home/store/*/.work/{artifact.replace('/', '-')}/checkpoint-*")
        )
        for name, worker in workers.items()
        for artifact in computed_by(lab, name, worker)
        if artifact.startswith("fine-tune/")
    )


def wait_for_fine_tuning(
    lab: Lab, workers: Mapping[str, subprocess.Popen[bytes]], process: subprocess.Popen[str]
) -> bool:
    """Says whether a fine-tuning goes on before the run ends."""
    deadline = time.monotonic() + 300
    while not is_fine_tuning(lab, workers):
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline, "no worker starts the fine-tuning"
        time.sleep(0.2)
    return True


def test_a_server_that_is_away_costs_nothing(lab: Lab, alone: Machine) -> None:
    laptop, waiting, seeds = lab.machine("laptop"), list(SERVERS), []
    with lab.worker("one") as one, lab.worker("two") as two:
        while waiting:
            seeds.append(10 + len(seeds))
            process = laptop.start(*recipe(seeds[-1]), *ON_WORKERS)
            alike = alone.start(*recipe(seeds[-1]))
            away = []
            while waiting and wait_for_fine_tuning(lab, {"one": one, "two": two}, process):
                away.append(waiting.pop(0))
                server = lab.servers[away[-1]]
                server.stop()
                time.sleep(AWAY_SECONDS)
                server.start()
            for each in (process, alike):
                text, _ = each.communicate(timeout=500)
                assert each.returncode == 0, f"{away}: {text}"
            assert away, "the fine-tuning was over before a server could be stopped"
        wait_for_free_slots(lab)
    for seed in seeds:
        path = f"finetune/order-image/seed-{seed}"
        assert laptop.metrics(path) == alone.metrics(path), seed
        called = f"finetune seed {seed}, image"
        told = points(lab.environment["MLFLOW_TRACKING_URI"], called)
        expected: dict[Any, Any] = points(f"sqlite:///{alone.folder}/mlruns/mlflow.db", called)
        assert told == expected, seed
    assert runs_in(lab, "RUNNING", "PENDING", "SCHEDULED") == []
