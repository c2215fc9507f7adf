"""What finished steps say of those that are still to run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from graftline.planning.history import history_of
from graftline.planning.plan import Step
from graftline.planning.run import plan_run
from graftline.settings.reading import load_recipe
from graftline.store import Store
from tests.graftline.stored import publish_timed

TINY = Path(__file__).resolve().parents[3] / "params/tiny.yaml"
MODALITIES = ("image", "audio", "video", "point_cloud")
FILES = {name: dict.fromkeys(("train", "validation", "test"), name) for name in MODALITIES}


def _steps(**overrides: object) -> list[Step]:
    return list(plan_run(load_recipe(TINY, overrides), FILES).steps.values())


def _first(steps: list[Step], kind: str) -> Step:
    return next(step for step in steps if step.kind == kind)


def _publish_all(store: Store, steps: list[Step], seconds: float) -> None:
    for step in steps:
        publish_timed(store, step, seconds)


def test_steps_of_another_llm_say_nothing(tmp_path: Path) -> None:
    steps, other = _steps(), _steps(**{"backbone.source": "smollm2-135m-instruct"})
    store = Store(tmp_path)
    _publish_all(store, other, 1000.0)
    asked = history_of(steps, store)
    assert asked.expected(_first(steps, "fine-tune")) is None
    assert asked.expected(_first(steps, "features")) == 1000.0  # encoders know no LLM
    assert history_of(other, store).expected(_first(other, "fine-tune")) == 1000.0


def test_the_same_parameters_come_before_the_same_kind(tmp_path: Path) -> None:
    store, steps = Store(tmp_path), _steps()
    _publish_all(store, steps, 3.0)
    longer = _steps(**{"fine_tune.steps": 12, "seed": 1})
    fine_tune = _first(longer, "fine-tune")
    asked = history_of(longer, store)
    assert asked.expected(fine_tune) == 3.0  # of its kind
    publish_timed(store, _first(longer, "align"), 4.0)
    publish_timed(store, fine_tune, 12.0)
    asked = history_of(longer, store)
    assert asked.expected(fine_tune) == 12.0
    other_seed = replace(fine_tune, parameters={**fine_tune.parameters, "seed": 2})
    assert asked.expected(other_seed) == 12.0
