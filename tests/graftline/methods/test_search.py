"""What is searched on validation rows, and how a search is recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from graftline.errors import GraftlineError
from graftline.merging.rules import parameters_for, rule_named
from graftline.methods.search import (
    BUDGET,
    CANDIDATES,
    Trial,
    best_of,
    candidates,
    write_trials,
)


@pytest.mark.parametrize("rule", CANDIDATES)
def test_every_rule_has_the_same_budget_of_valid_different_candidates(rule: str) -> None:
    found = [parameters_for(rule_named(rule), each, 4) for each in candidates(rule)]
    assert len(found) == BUDGET == len({repr(each) for each in found})
    assert found[0] == rule_named(rule).parameters()


def test_rules_without_parameters_are_named() -> None:
    with pytest.raises(GraftlineError, match="average: there is nothing to search"):
        candidates("average")


def test_the_best_is_chosen_and_the_default_wins_a_tie(tmp_path: Path) -> None:
    default = Trial({}, None, {"image": 0.5, "audio": 0.3})
    trials = [default, Trial({"scale": 0.2}, 80.0, {"image": 0.3, "audio": 0.5})]
    assert best_of(trials) == default
    trials.append(Trial({"scale": 0.3}, 80.5, {"image": 0.6, "audio": 0.3}))
    assert best_of(trials).parameters == {"scale": 0.3}
    write_trials(tmp_path / "search/ties-seed-0.json", "ties", trials, 0, "abc")
    content = json.loads((tmp_path / "search/ties-seed-0.json").read_text())
    assert content["chosen"] == {"scale": 0.3}
    assert content["split"] == "validation"
    assert content["budget"] == len(content["trials"]) == 3
