"""Eight runs at once on two workers: none lost, none mixed up, what they share computed once."""

from __future__ import annotations

import logging
import re

import pytest

from tests.cluster.conftest import Lab, Machine
from tests.cluster.seen import (
    ON_WORKERS,
    published,
    runs_in,
    slots_taken,
    wait_for_free_slots,
)

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(3000)]

METHODS = ("mera", "finetune", "merge-only", "realign-only")
ORDERS = (("image",), ("image", "audio"))
SEED = 70


def _recipe(method: str, order: tuple[str, ...]) -> list[str]:
    changes = [f"order=[{','.join(order)}]", "evaluation.references=false"]
    given = [word for change in changes for word in ("--set", change)]
    return ["run", "params/tiny.yaml", "--method", method, "--seed", str(SEED), *given]


def test_eight_runs_at_once(lab: Lab, alone: Machine, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "werkzeug")  # the object store's requests
    wanted = [(method, order) for order in ORDERS for method in METHODS]
    laptop = lab.machine("laptop")
    with lab.worker("one"), lab.worker("two"):
        runs = {each: laptop.start(*_recipe(*each), *ON_WORKERS) for each in wanted}
        for each in wanted:
            code, text = alone.run(*_recipe(*each))
            assert code == 0, text
        for each, process in runs.items():
            text, _ = process.communicate(timeout=2500)
            assert process.returncode == 0, f"{each}: {text}"
        wait_for_free_slots(lab)
    for method, order in wanted:
        path = f"{method}/order-{'-'.join(order)}/seed-{SEED}"
        assert laptop.metrics(path) == alone.metrics(path), path
    here, there = alone.bits(), published(lab)
    assert {name: there.get(name) for name in here} == here
    assert runs_in(lab, "RUNNING", "PENDING", "SCHEDULED") == [] and slots_taken(lab) == 0
    assert any("/manifest.json" in text for text in caplog.messages), "requests are seen"
    twice = _lost(caplog)
    assert len(twice) <= 1, f"computed by both workers: {twice}"


def _lost(log: pytest.LogCaptureFixture) -> list[str]:
    """Manifests that a worker had made and found published: steps that were computed twice."""
    return [
        found[1]
        for text in log.messages
        if (found := re.search(r'PUT (\S*/manifest\.json).*" 412', text))
    ]
