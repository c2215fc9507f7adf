"""Which parameters of a merge rule are tried on validation rows: the same budget for every rule."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from graftline.durable import atomic_write_text
from graftline.errors import GraftlineError

BUDGET = 6
"""Candidates a rule; the paper's default is the first."""

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
            {"lambdas": 0.5}, {"alphas": 1.2},
        ),
    }
)  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """A candidate and what it reached on validation rows.

    Attributes:
        parameters: what differs from the rule's defaults.
        retention: in per cent; None where an expert scores nothing.
        scores: modality -> score from 0 to 1; candidates are compared by their mean.
    """

    parameters: Mapping[str, Any]
    retention: float | None
    scores: Mapping[str, float]

    @property
    def score(self) -> float:
        """The mean over modalities."""
        return math.fsum(self.scores.values()) / len(self.scores)


def candidates(rule: str) -> Sequence[Mapping[str, Any]]:
    """The candidates of a rule.

    Raises:
        GraftlineError: the rule has nothing to choose; says which rules have.
    """
    if rule not in CANDIDATES:
        raise GraftlineError(
            f"{rule}: there is nothing to search; rules with parameters are {', '.join(CANDIDATES)}"
        )
    return CANDIDATES[rule]


def best_of(trials: Sequence[Trial]) -> Trial:
    """The trial with the highest mean score; the first of several, so the default wins a tie."""
    return max(trials, key=lambda trial: trial.score)


def write_trials(file: Path, rule: str, trials: Sequence[Trial], seed: int, data_md5: str) -> None:
    """Records a search as JSON: the budget, every trial, and the choice."""
    content = {
        "rule": rule,
        "split": "validation",
        "budget": len(trials),
        "seed": seed,
        "data_md5": data_md5,
        "chosen": dict(best_of(trials).parameters),
        "trials": [
            {"parameters": dict(t.parameters), "retention": t.retention, "scores": dict(t.scores)}
            for t in trials
        ],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(file, json.dumps(content, indent=2) + "\n")
