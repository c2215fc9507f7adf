"""Every continual method on the tiny recipe, by numbers that were seen before.

What two runs of the same code agree on, a wrong coefficient or loss changes in both. These numbers
change only where what is computed changes: then look at each, and take the new ones over.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest

from graftline.recipe import ContinualName
from tests.flows.conftest import PAIR, Project

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_server")]

GOLDEN = Path(__file__).with_name("golden.json")
TOLERANCE = 0.004
"""Relative: other processors round otherwise."""
STRONG = ("--set", "rivals.ewc.strength=1000", "--set", "rivals.lwf.strength=300")
"""So that each rival's own term shows in six steps."""


def measured(project: Project) -> dict[str, dict[str, list[float]]]:
    """Text perplexity of each method's model, and losses of every training step, by kind.

    A correction in closed form has none; its tests are its own.
    """
    found: dict[str, dict[str, list[float]]] = {"perplexity": {}, "first loss": {}, "last loss": {}}
    for file in sorted(project.folder.glob("reports/tiny/*/order-image-audio/seed-0/metrics.json")):
        metrics = json.loads(file.read_text())
        found["perplexity"][metrics["method"]] = [metrics["text_perplexity_after"]]
    for file in sorted(project.folder.glob("artifacts/*/*/history.json")):
        losses = json.loads(file.read_text())["losses"]
        kind = file.parent.parent.name
        found["first loss"].setdefault(kind, []).append(losses[0])
        found["last loss"].setdefault(kind, []).append(losses[-1])
    return {
        name: {
            key: [float(f"{value:.5g}") for value in sorted(group[key])] for key in sorted(group)
        }
        for name, group in found.items()
    }


@pytest.mark.timeout(900)
def test_every_method_computes_what_it_did(fresh: Project, tmp_path: Path) -> None:
    methods = [name for name in get_args(ContinualName) if name != "experts"]
    given = ("--methods", ",".join(methods), *PAIR, *STRONG)
    code, text = fresh.run("compare", "params/tiny.yaml", *given, seconds=600)
    assert code == 0, text
    rows = (fresh.folder / "reports/tiny/compare/table.csv").read_text().splitlines()
    assert {row.split(",")[1] for row in rows[1:]} == set(methods)
    now = measured(fresh)
    (tmp_path / "golden.json").write_text(json.dumps(now, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    assert {name: list(group) for name, group in now.items()} == {
        name: list(group) for name, group in golden.items()
    }
    for method in ("ewc", "lwf", "replay", "der"):
        apart = now["perplexity"][method][0] / now["perplexity"]["finetune"][0] - 1.0
        assert abs(apart) > 2 * TOLERANCE, f"{method} is not told apart from naive fine-tuning"
    for name, group in golden.items():
        for key, values in group.items():
            wanted = pytest.approx(values, rel=TOLERANCE, abs=1e-4 if key == "distil" else 0.0)
            assert now[name][key] == wanted, f"{name}, {key}; all of them: {tmp_path}/golden.json"
