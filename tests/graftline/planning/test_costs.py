"""What runs' time went into."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from graftline import manifest
from graftline.planning.costs import (
    Window,
    _bytes_carried,
    busy_seconds,
    seconds_by_activity,
    seconds_of,
    step_seconds,
)
from graftline.planning.history import TIMING
from graftline.planning.run import plan_run
from graftline.settings.reading import load_recipe
from graftline.steps.execution import begin_session
from graftline.store import Store

TINY = Path(__file__).resolve().parents[3] / "params/tiny.yaml"
NAMES = ("image", "audio", "video", "point_cloud")
SIZES = {
    "backbone/model.safetensors": 1_000_000,
    **{f"connector-{name}.safetensors": 10_000 for name in NAMES},
    "train/features.safetensors": 400,
    "subspace.safetensors": 7_000,
    "logits-00000.safetensors": 60_000,
    "fisher.safetensors": 2_000_000,
    "statistics.safetensors": 3,
    "adapters.safetensors": 90_000,
    "history.json": 5,
}
"""Files of every artifact, so that what is counted of one can be told apart."""


class Everywhere(Store):
    """Holds the manifest of any artifact."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        files = {name: {"sha256": "", "size": size} for name, size in SIZES.items()}
        content = {"format": manifest.FORMAT, "files": files}
        content["digest"] = manifest._digest(content)
        (folder / "manifest.json").write_text(json.dumps(content))

    def notes(self, kind: str, fingerprint: str) -> Path:
        return self._folder


@pytest.mark.parametrize(
    ("method", "changes", "carried"),
    [
        ("finetune", {}, 0),
        ("merge-only", {}, 0),
        ("connector-only", {}, 0),
        ("pathweave", {}, 0),
        ("lwf", {}, 0),
        ("mera", {}, 3 * 100),  # a quarter of three modalities' features
        ("replay", {}, 3 * 100),
        ("joint", {}, 3 * 400),  # all of what is not the last one's
        ("ewc", {}, 2_000_000),
        ("o-lora", {}, 3 * 7_000),
        ("der", {}, 3 * (100 + 60_000)),
        ("mera+", {"distil.own": "answers"}, 3 * 3),
        # the teachers of image and audio; video's is the model before
        (
            "mera+", {"distil.own": "answers", "distil.teacher": "first"},
            3 * 3 + 2 * (1_000_000 + 10_000),
        ),
        ("ties", {"compose.growing": True}, 3 * 1_000_000),  # the old experts
        ("route", {"compose.growing": True}, 0),  # old experts are of the model itself
    ],
)  # fmt: skip
def test_what_learning_needs_of_earlier_stages(
    method: str, changes: dict[str, object], carried: int, tmp_path: Path
) -> None:
    given = {"method": method, "replay.fraction": 0.25, **changes}
    files = {name: dict.fromkeys(("train", "validation", "test"), "0") for name in NAMES}
    plan = plan_run(load_recipe(TINY, given), files)
    assert _bytes_carried(plan, Everywhere(tmp_path)) == carried


def test_a_step_that_runs_share_counts_once() -> None:
    one = {"align/a": 2.0, "evaluate/x": 3.0, "merge/m": 1.0}
    other = {"align/a": 2.0, "fine-tune/b": 5.0, "perplexity/p": 0.5, "features/f": 4.0}
    found = seconds_by_activity([one, other])
    assert found == pytest.approx(
        {"training": 7.0, "evaluation": 3.5, "merging": 1.0, "preparation": 4.0}
    )
    assert seconds_by_activity([one, one]) == seconds_by_activity([one])


def test_a_step_that_was_killed_counts_what_it_did_up_to_its_checkpoint(tmp_path: Path) -> None:
    assert begin_session(tmp_path) == 0.0
    assert begin_session(tmp_path) == 0.0  # killed before it saved anything
    now, note = time.time(), tmp_path / "session.json"
    note.write_text(json.dumps({**json.loads(note.read_text()), "begun": now - 100.0}))
    (tmp_path / "checkpoint-2").mkdir()
    os.utime(tmp_path / "checkpoint-2", (now - 40.0, now - 40.0))
    assert begin_session(tmp_path) == pytest.approx(60.0)
    assert begin_session(tmp_path) == pytest.approx(60.0)  # nothing more was saved


def test_what_earlier_sessions_took_was_not_spent_in_this_run(tmp_path: Path) -> None:
    store = Store(tmp_path)
    files = {name: dict.fromkeys(("train", "validation", "test"), "0") for name in NAMES}
    step = next(iter(plan_run(load_recipe(TINY, {}), files).steps.values()))
    timing = {"step_seconds": 3700.0, "last_session_seconds": 100.0}
    found = step.publish(store, lambda out: (out / TIMING).write_text(json.dumps(timing)) and None)
    end = (found.folder / TIMING).stat().st_mtime
    assert busy_seconds([step], store, Window(end - 1000.0, end)) == pytest.approx(100.0)
    assert step_seconds(step, store) == 3700.0


def test_a_step_of_an_earlier_version_that_recorded_no_time_counts_as_none(tmp_path: Path) -> None:
    store = Store(tmp_path)
    files = {name: dict.fromkeys(("train", "validation", "test"), "0") for name in NAMES}
    step = next(iter(plan_run(load_recipe(TINY, {}), files).steps.values()))
    step.publish(store, lambda out: (out / TIMING).write_text('{"seconds": 3.0}') and None)
    assert step_seconds(step, store) is None
    assert seconds_of([step], store) == 0.0
