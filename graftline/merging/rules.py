"""The registry of merge rules, and the check of what a user asks of them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from graftline.errors import GraftlineError
from graftline.merging import (
    average,
    consensus,
    dare_ties,
    emr,
    mmer,
    pcb,
    task_arithmetic,
    ties,
)
from graftline.merging.core import MergeParameters, Rule

RULES: Mapping[str, Rule] = MappingProxyType(
    {
        rule.name: rule
        for rule in (
            average.RULE,
            task_arithmetic.RULE,
            ties.RULE,
            dare_ties.RULE,
            emr.RULE,
            consensus.RULE,
            pcb.RULE,
            mmer.RULE,
        )
    }
)


class UnknownRule(GraftlineError):
    """A rule or parameter that does not exist, or a value out of its bounds."""


def rule_named(name: str) -> Rule:
    """Finds a rule.

    Raises:
        UnknownRule: there is none of that name; says which there are.
    """
    if name in RULES:
        return RULES[name]
    close = difflib.get_close_matches(name, RULES, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise UnknownRule(f"rule: {name!r} is not one of {', '.join(RULES)}{hint}")


def parameters_for(rule: Rule, values: Mapping[str, Any], experts: int) -> MergeParameters:
    """Checks a rule's parameters.

    Args:
        rule: from `rule_named`.
        values: key -> value; what is left out keeps the paper's default.
        experts: how many experts are merged.

    Raises:
        UnknownRule: lists every unknown key, value out of bounds, and list of the wrong length.
    """
    try:
        found = rule.parameters.model_validate(dict(values))
    except ValidationError as error:
        lines = sorted({_describe(rule, problem) for problem in error.errors()})
    else:
        lines = [
            f"{key}: {len(value)} values for {experts} experts; give one, or one for each"
            for key, value in found.model_dump().items()
            if isinstance(value, tuple) and len(value) != experts
        ]
        if not lines:
            return found
    listed = "\n".join(f"  - {line}" for line in lines)
    raise UnknownRule(f"rule {rule.name}: {len(lines)} problem(s) with its parameters:\n{listed}")


def _describe(rule: Rule, problem: Any) -> str:
    key = str(problem["loc"][0])
    if problem["type"] == "extra_forbidden":
        valid = list(rule.parameters.model_fields)
        close = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        return f"{key}: unknown key; it has {', '.join(valid) or 'none'}{hint}"
    return f"{key}: {problem['msg']} (given: {problem['input']!r})"[:300]
