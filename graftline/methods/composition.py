"""Composition: experts trained apart from theta_0, then combined without training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from graftline.merging.rules import rule_named
from graftline.methods import Stage
from graftline.methods.experts import expert
from graftline.planning.plan import Model, Planner, Reference

TEXT_RULE = "average"
"""How experts are merged for text where each is kept apart (`route`): what a prompt without media
meets, and with `compose.text: merged` all text."""


def composition(rule: str) -> Callable[[Planner, Sequence[str]], list[Stage]]:
    """The method that combines the experts by a rule: one stage, at whose end all are there.

    With a rule that keeps a mask an expert (`mmer`, `emr`), each modality's tokens
    meet their own decoupled weights; text meets those of the medium before it, and the merged ones
    where a prompt shows none (`compose.text`).
    """

    def compose(planner: Planner, experts: Mapping[str, Model]) -> Model:
        model = Model(planner.compose(rule, experts), _connectors(experts))
        return replace(model, base=planner.backbone()) if rule_named(rule).one_per_expert else model

    return lambda planner, order: _stages(planner, order, compose)


def route(planner: Planner, order: Sequence[str]) -> list[Stage]:
    """Every expert is kept, and a token meets its modality's: the upper bound of composition.

    With `compose.rank` an expert is kept as theta_0 and a low-rank product, as LoRA experts are.
    """
    rank = planner.recipe.compose.rank
    return _stages(planner, order, _with_experts if rank is None else _with_adapters)


def _stages(
    planner: Planner,
    order: Sequence[str],
    compose: Callable[[Planner, Mapping[str, Model]], Model],
) -> list[Stage]:
    """One composition of all experts; or, growing, one a stage: each expert is one vector more."""
    first = 1 if planner.recipe.compose.growing else len(order)
    stages = []
    for count in range(first, len(order) + 1):
        experts = {name: expert(planner, name) for name in order[:count]}
        added = order[count - 1]
        vanilla = experts[added] if planner.recipe.compose.growing else None
        stages.append(Stage(count, added, compose(planner, experts), vanilla))
    return stages


def _connectors(experts: Mapping[str, Model]) -> dict[str, Reference]:
    return {name: model.connectors[name] for name, model in experts.items()}


def _with_experts(planner: Planner, experts: Mapping[str, Model]) -> Model:
    kept = {name: model.backbone for name, model in experts.items()}
    text = planner.compose(TEXT_RULE, experts)
    return Model(text, _connectors(experts), experts=kept)


def _with_adapters(planner: Planner, experts: Mapping[str, Model]) -> Model:
    rank = planner.recipe.compose.rank
    assert rank is not None
    adapters = {
        name: planner.adapters(model.backbone, name, rank) for name, model in experts.items()
    }
    return Model(planner.backbone(), _connectors(experts), adapters=adapters)
