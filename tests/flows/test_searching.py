"""What decides a search, and what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli import app
from flows.searching import describe, trial_of
from graftline.methods.search import search_of, write_trials
from graftline.planning.run import plan_run
from graftline.settings.reading import load_recipe

TINY = Path(__file__).resolve().parents[2] / "params" / "tiny.yaml"
LOYAL = {"scores": {"a": 0.6, "b": 0.4}, "scores_when_learned": {"a": 0.7, "b": 0.4}}
QUICK = {"scores": {"a": 0.1, "b": 0.8}, "scores_when_learned": {"a": 0.7, "b": 0.8}}


@pytest.mark.parametrize(
    ("method", "rates", "chosen", "said"),
    [
        ("ewc", False, 0, ["*   50.0  {}", "in the recipe: the defaults"]),
        (
            "finetune", True, 1,
            ["*   75.0", "methods: {finetune: {fine_tune: {learning_rate: 0.0001, steps: 6}}}"],
        ),
        ("replay", True, 0, ["*   50.0", "at the end, validation rows"]),
        ("ties", False, 0, ["in the recipe: compose: {parameters: {ties: {}}}"]),
    ],
)  # fmt: skip
def test_settings_are_judged_by_the_end_and_rates_by_what_was_just_learned(
    method: str, rates: bool, chosen: int, said: list[str], tmp_path: Path
) -> None:
    recipe = load_recipe(TINY, {"order": ["audio", "image"]})
    search = search_of(method, recipe, rates=rates)
    trials = [
        trial_of(search, candidate, {"retention": None, "fingerprint": "f", **metrics})
        for candidate, metrics in zip(search.candidates[:2], (LOYAL, QUICK), strict=True)
    ]
    write_trials(tmp_path / "search.json", search, trials, recipe, "md5")
    text = describe(tmp_path / "search.json")
    assert all(words in text for words in [*said, "order audio, image"]), text
    starred = [" * " in line for line in text.splitlines()[1:3]]
    assert starred == [chosen == 0, chosen == 1]


@pytest.mark.parametrize("method", ["ties", "mmer", "ewc", "mera"])
def test_candidates_are_asked_on_validation_rows_and_only_what_decides(method: str) -> None:
    recipe = load_recipe(TINY)
    files = {name: dict.fromkeys(("train", "validation", "test"), "0") for name in recipe.order}
    search = search_of(method, recipe, rates=False)
    for candidate in search.candidates:
        tried = load_recipe(TINY, search.overrides(candidate))
        steps = plan_run(tried, files).steps.values()
        asked = [step for step in steps if step.kind.startswith("evaluate")]
        assert {(step.kind, step.parameters["split"]) for step in asked} == {
            ("evaluate", "validation")
        }


def test_rates_of_all_methods_are_searched_where_none_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["search", str(TINY), "--rates", "--budget"])
    assert "run: graftline data build" in str(result.exception)
