"""What is tried on validation rows: the same small budget for every merge rule and every rival."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from graftline.durable import atomic_write_text
from graftline.errors import GraftlineError
from graftline.recipe import RIVALS, Recipe

CANDIDATES: Mapping[str, tuple[Mapping[str, Any], ...]] = MappingProxyType(
    {
        "task-arithmetic": (
            {}, {"scale": 0.2}, {"scale": 0.3}, {"scale": 0.6}, {"scale": 0.8}, {"scale": 1.0},
        ),
        "ties": (
            {}, {"scale": 0.6}, {"density": 0.5}, {"density": 0.5, "scale": 0.6},
            {"density": 0.5, "scale": 1.5}, {"density": 0.1, "scale": 1.5},
        ),
        "dare-ties": (
            {}, {"drop": 0.9, "scale": 0.3}, {"drop": 0.5}, {"drop": 0.5, "scale": 0.6},
            {"drop": 0.2}, {"drop": 0.2, "scale": 0.6},
        ),
        "consensus": (
            {}, {"scale": 0.3}, {"scale": 0.6}, {"lambdas": 0.2}, {"lambdas": 0.6},
            {"agreement": 1},
        ),
        "pcb": (
            {}, {"scale": 0.8}, {"ratio": 0.2}, {"ratio": 0.2, "scale": 0.8}, {"ratio": 0.05},
            {"ratio": 0.5, "scale": 0.8},
        ),
        "mmer": (
            {}, {"density": 0.5}, {"density": 0.5, "scale": 0.6}, {"lambdas": 0.7},
            {"alphas": 1.2}, {"alphas": 1.4},
        ),
    }
)  # fmt: skip
"""Merge rule -> its parameters; six for each rule, the defaults first."""


def _each(key: str, *values: float) -> tuple[Mapping[str, Any], ...]:
    return ({}, *({key: value} for value in values))


SETTINGS: Mapping[str, tuple[Mapping[str, Any], ...]] = MappingProxyType(
    {
        "ewc": _each("rivals.ewc.strength", 1e-4, 1e-3, 0.1, 1.0, 10.0),
        "lwf": _each("rivals.lwf.strength", 0.1, 0.3, 3.0, 10.0, 30.0),
        "der": (
            {}, {"rivals.der.alpha": 0.01}, {"rivals.der.alpha": 0.03}, {"rivals.der.alpha": 1.0},
            {"rivals.der.beta": 1.0}, {"rivals.der.alpha": 0.03, "rivals.der.beta": 1.0},
        ),
        "o-lora": (
            {}, {"rivals.o_lora.strength": 0.05}, {"rivals.o_lora.strength": 5.0},
            {"rivals.o_lora.rank": 32, "rivals.o_lora.strength": 0.05},
            {"rivals.o_lora.rank": 32}, {"rivals.o_lora.rank": 32, "rivals.o_lora.strength": 5.0},
        ),
        "pathweave": (
            {}, {"rivals.pathweave.alpha": 8.0}, {"rivals.pathweave.rank": 32},
            {"rivals.pathweave.rank": 32, "rivals.pathweave.alpha": 128.0},
            {"rivals.pathweave.rank": 128, "rivals.pathweave.alpha": 128.0},
            {"rivals.pathweave.rank": 128, "rivals.pathweave.alpha": 512.0},
        ),
        "mera": (
            {}, {"merge.coefficient": 0.3}, {"merge.coefficient": 0.5}, {"merge.coefficient": 0.7},
            {"merge.depth": 0.5}, {"merge.depth": -0.5},
        ),
        "mera+": (
            {}, {"distil.teacher": "first"}, {"distil.teacher": "first", "mera_plus.replay": 0.01},
            {"distil.teacher": "first", "distil.samples": 1280},
            {"distil.teacher": "first", "distil.clusters": 256},
            {"distil.teacher": "first", "distil.learning_rate": 1e-4},
        ),
    }
)  # fmt: skip
"""Method -> dotted recipe keys: its own settings, for MERA the coefficients of its merge; as many
for each, too, the defaults first."""
RATED = ("finetune", *RIVALS, "connector-only", "joint")
"""Methods whose learning rate and length can be searched."""
_RATES = ((1.0, 1), (1 / 3, 1), (3.0, 1), (1.0, 2), (1 / 3, 2), (3.0, 2))
_CONNECTOR_RATES = ((1.0, 1), (10.0, 1), (10.0, 2), (30.0, 2), (10.0, 4), (30.0, 4))
"""Factors of the recipe's learning rate and `fine_tune.steps`. A connector that learns alone takes
higher rates than one beside the LLM, whose rate the recipe's is, and more steps: on the starter
four times as many cost what MERA's fine-tuning and realigning do."""
JudgedBy = Literal["final", "when learned"]


def _default(key: str) -> tuple[str, Any]:
    """A dotted recipe key with its default: what is searched does not depend on what was chosen."""
    part: Any = Recipe
    *groups, last = key.split(".")
    for group in groups:
        part = part.model_fields[group].annotation
    return key, part.model_fields[last].get_default()


@dataclass(frozen=True)
class Search:
    """What is tried for one method, and what decides.

    Attributes:
        method: a merge rule or a continual method.
        candidates: what differs from the defaults, or for rates from the recipe; the first is
            these themselves.
        judged_by: `final`: the mean over modalities of the last model's scores; `when learned`:
            the mean over stages of what the newest modality scores, for naive fine-tuning.
        what: `parameters` of a rule, `settings` of another method, or `rates`.
    """

    method: str
    candidates: Sequence[Mapping[str, Any]]
    judged_by: JudgedBy
    what: Literal["parameters", "settings", "rates"]

    @property
    def name(self) -> str:
        """Of the file that records it."""
        return f"{self.method}-rates" if self.what == "rates" else self.method

    def overrides(self, candidate: Mapping[str, Any]) -> dict[str, Any]:
        """Dotted recipe keys of a candidate's run."""
        if self.what == "parameters":
            own: dict[str, Any] = {f"compose.parameters.{self.method}": candidate}
        else:
            keys = {key for each in self.candidates for key in each} if self.what != "rates" else ()
            # what is compared is the chain's own scores; a merge rule's experts are shared anyway
            own = {**dict(map(_default, keys)), **candidate, "evaluation.references": False}
        asked = {"evaluation.split": "validation", "evaluation.joint": False}
        return {"method": self.method, **asked, **own}


def search_of(method: str, recipe: Recipe, *, rates: bool) -> Search:
    """The search of a method.

    Args:
        method: of `CANDIDATES`, `SETTINGS` or `RATED`.
        recipe: whose learning rate and steps are the middle of what is tried.
        rates: search the learning rate and length, and not the method's own settings. A method
            without settings of its own has nothing else.

    Raises:
        GraftlineError: the method has nothing to choose; says which have.
    """
    if method in CANDIDATES and not rates:
        return Search(method, CANDIDATES[method], "final", "parameters")
    if method in SETTINGS and not rates:
        return Search(method, SETTINGS[method], "final", "settings")
    if method in RATED:
        judged_by: JudgedBy = "when learned" if method == "finetune" else "final"
        return Search(method, _rates(method, recipe), judged_by, "rates")
    raise GraftlineError(
        f"{method}: it has no learning rate to search; methods that have: {', '.join(RATED)}"
        if rates
        else f"{method}: there is nothing to search; {', '.join(CANDIDATES)} have parameters, "
        f"{', '.join(SETTINGS)} settings, {', '.join(RATED)} a learning rate (--rates)"
    )


def _rates(method: str, recipe: Recipe) -> list[Mapping[str, Any]]:
    """The recipe's learning rate and length, and others around them."""
    alone, tuned = method == "connector-only", recipe.common().fine_tune
    key = "connector_learning_rate" if alone else "learning_rate"
    rate = getattr(tuned, key)
    return [
        {
            f"fine_tune.{key}": rate if factor == 1.0 else float(f"{rate * factor:.2g}"),
            "fine_tune.steps": tuned.steps * length,
        }
        for factor, length in (_CONNECTOR_RATES if alone else _RATES)
    ]


@dataclass(frozen=True)
class Trial:
    """A candidate and what it reached on validation rows.

    Attributes:
        parameters: what differs from the recipe, or from the rule's defaults.
        retention: in per cent; None where an expert scores nothing, or none was asked.
        scores: modality -> score from 0 to 1; candidates are compared by their mean.
        fingerprint: of its run; records of earlier versions have none.
    """

    parameters: Mapping[str, Any]
    retention: float | None
    scores: Mapping[str, float]
    fingerprint: str | None = None

    @property
    def score(self) -> float:
        """The mean over modalities."""
        return math.fsum(self.scores.values()) / len(self.scores)


def best_of(trials: Sequence[Trial]) -> Trial:
    """The trial with the highest mean score; the first of several, so the default wins a tie."""
    return max(trials, key=lambda trial: trial.score)


def write_trials(
    file: Path, search: Search, trials: Sequence[Trial], recipe: Recipe, data_md5: str
) -> None:
    """Records a search as JSON: the budget, every trial, and the choice.

    Args:
        file: where.
        search: what was tried.
        trials: in the order in which they were tried.
        recipe: which order of modalities was learned, with which seed.
        data_md5: the data's version.
    """
    content = {
        "rule": search.method,
        "what": search.what,
        "judged_by": search.judged_by,
        "split": "validation",
        "budget": len(trials),
        "seed": recipe.seed,
        "order": list(recipe.order),
        "data_md5": data_md5,
        "chosen": dict(best_of(trials).parameters),
        "trials": [
            {
                "parameters": dict(trial.parameters),
                "retention": trial.retention,
                "scores": dict(trial.scores),
                "fingerprint": trial.fingerprint,
            }
            for trial in trials
        ],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(file, json.dumps(content, indent=2) + "\n")
