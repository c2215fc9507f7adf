"""What is searched on validation rows, and how a search is recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from graftline.errors import GraftlineError
from graftline.merging.rules import parameters_for, rule_named
from graftline.methods.search import (
    CANDIDATES,
    RATED,
    SETTINGS,
    Trial,
    best_of,
    search_of,
    write_trials,
)
from graftline.settings.reading import load_recipe

BUDGET = 6
TINY = Path(__file__).parents[3] / "params" / "tiny.yaml"


@pytest.mark.parametrize("rule", CANDIDATES)
def test_every_rule_has_the_same_budget_of_valid_different_candidates(rule: str) -> None:
    found = [parameters_for(rule_named(rule), each, 4) for each in CANDIDATES[rule]]
    assert len(found) == BUDGET == len({repr(each) for each in found})
    assert found[0] == rule_named(rule).parameters()


def test_rules_without_parameters_are_named() -> None:
    for method, rates, words in (
        ("average", False, "average: there is nothing to search"),
        ("experts", False, "nothing to search.*ewc, lwf.*--rates"),
        ("ties", True, "no learning rate to search.*finetune, replay"),
    ):
        with pytest.raises(GraftlineError, match=words):
            search_of(method, load_recipe(TINY), rates=rates)


@pytest.mark.parametrize("method", SETTINGS)
def test_every_rival_has_the_same_budget_of_valid_different_settings(method: str) -> None:
    search = search_of(method, load_recipe(TINY), rates=False)
    assert (search.judged_by, search.name) == ("final", method)
    found = [load_recipe(TINY, search.overrides(each)) for each in search.candidates]
    own = [(each.rivals, each.merge, each.distil, each.mera_plus) for each in found]
    assert len(found) == BUDGET == len({repr(each) for each in own})
    assert found[0].model_dump(exclude={"method", "evaluation"}) == load_recipe(TINY).model_dump(
        exclude={"method", "evaluation"}
    )
    for recipe in found:
        assert (recipe.method, recipe.evaluation.split) == (method, "validation")
        assert not recipe.evaluation.references


@pytest.mark.parametrize("method", SETTINGS)
def test_what_was_chosen_does_not_change_what_is_searched(method: str) -> None:
    search = search_of(method, load_recipe(TINY), rates=False)
    default, *_, last = (search.overrides(candidate) for candidate in search.candidates)
    chosen = load_recipe(TINY, {**last, **default})  # the default over a recipe with the last one
    assert repr(chosen) == repr(load_recipe(TINY, default))


@pytest.mark.parametrize("method", RATED)
def test_rates_are_tried_around_the_recipe_s_and_judged_by_what_is_kept(method: str) -> None:
    recipe = load_recipe(TINY)
    search = search_of(method, recipe, rates=True)
    judged_by = "when learned" if method == "finetune" else "final"
    assert (search.judged_by, search.name) == (judged_by, f"{method}-rates")
    found = [load_recipe(TINY, search.overrides(each)).fine_tune for each in search.candidates]
    assert found[0] == recipe.fine_tune
    assert len({repr(each) for each in found}) == len(found) == BUDGET
    if method == "connector-only":
        assert {each.learning_rate for each in found} == {3e-4}
        assert {each.connector_learning_rate for each in found} == {5e-4, 5e-3, 1.5e-2}
        assert {each.steps for each in found} == {6, 12, 24}
    else:
        assert {(each.learning_rate, each.steps) for each in found} == {
            (rate, steps) for rate in (1e-4, 3e-4, 9e-4) for steps in (6, 12)
        }
    if method not in SETTINGS:  # it has nothing else to search
        assert search == search_of(method, recipe, rates=False)


def test_the_best_is_chosen_and_the_default_wins_a_tie(tmp_path: Path) -> None:
    default = Trial({}, None, {"image": 0.5, "audio": 0.3})
    trials = [default, Trial({"scale": 0.2}, 80.0, {"image": 0.3, "audio": 0.5})]
    assert best_of(trials) == default
    trials.append(Trial({"scale": 0.3}, 80.5, {"image": 0.6, "audio": 0.3}))
    assert best_of(trials).parameters == {"scale": 0.3}
    recipe = load_recipe(TINY)
    search = search_of("ties", recipe, rates=False)
    write_trials(tmp_path / "search/ties-seed-0.json", search, trials, recipe, "abc")
    content = json.loads((tmp_path / "search/ties-seed-0.json").read_text())
    assert content["chosen"] == {"scale": 0.3}
    assert content["split"] == "validation"
    assert (content["seed"], content["order"]) == (0, list(recipe.order))
    assert content["budget"] == len(content["trials"]) == 3
