"""Composition: experts trained apart from theta_0, then combined without training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from graftline.merging.rules import rule_named
from graftline.methods import Stage
from graftline.methods.experts import expert
from graftline.plan import Model, Planner

TEXT_RULE = "average"
"""What text tokens meet where every expert is kept apart (`route`)."""


def composition(rule: str) -> Callable[[Planner, Sequence[str]], list[Stage]]:
    """The method that combines the experts by a rule: one stage, at whose end all are there.

    With a rule that keeps a mask an expert (`mmer`, `emr`, `consensus`), each modality's tokens
    meet their own decoupled weights; text meets the merged ones.
    """

    def compose(planner: Planner, order: Sequence[str]) -> list[Stage]:
        experts = {name: expert(planner, name) for name in order}
        connectors = {name: model.connectors[name] for name, model in experts.items()}
        model = Model(planner.compose(rule, experts), connectors)
        if rule_named(rule).one_per_expert:
            model = replace(model, base=planner.backbone())
        return [Stage(len(order), order[-1], final=model)]

    return compose


def route(planner: Planner, order: Sequence[str]) -> list[Stage]:
    """Every expert is kept, and a token meets its modality's: the upper bound of composition.

    With `compose.rank` an expert is kept as theta_0 and a low-rank product, as LoRA experts are.
    """
    rank = planner.recipe.compose.rank
    if rank is not None:
        return [Stage(len(order), order[-1], final=_with_adapters(planner, order, rank))]
    [stage] = composition(TEXT_RULE)(planner, order)
    experts = {name: expert(planner, name).backbone for name in order}
    return [replace(stage, final=replace(stage.final, experts=experts))]


def _with_adapters(planner: Planner, order: Sequence[str], rank: int) -> Model:
    experts = {name: expert(planner, name) for name in order}
    connectors = {name: model.connectors[name] for name, model in experts.items()}
    adapters = {
        name: planner.adapters(model.backbone, name, rank) for name, model in experts.items()
    }
    return Model(planner.backbone(), connectors, adapters=adapters)
