"""Consensus merging: keep of the summed task vectors what enough experts use (TALL masks)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from graftline.merging.core import (
    Context,
    Merged,
    MergeParameters,
    PerExpert,
    Rule,
    check_shapes,
    ordered_sum,
    per_expert,
)

Strictness = Annotated[float, Field(gt=0.0, le=10.0)]


class ConsensusParameters(MergeParameters):
    """When an expert uses an element, how many have to, and how far to go."""

    lambdas: Strictness | tuple[Strictness, ...] = Field(
        0.4, description="TALL masks' lambda, one or one an expert; the paper tries 0.2 to 0.6"
    )
    agreement: int = Field(2, ge=0, description="experts that must use an element (the paper's k)")
    scale: float = Field(0.4, gt=0.0, le=10.0, description="as task arithmetic's")


def tall_mask(tau: Tensor, total: Tensor, strictness: float) -> Tensor:
    """Where |tau_i| > lambda |tau_sum - tau_i| (Wang et al., ICML 2024).

    Args:
        tau: an expert's task vector, float64.
        total: the sum of all of them, same shape and dtype.
        strictness: lambda.

    Returns:
        bool in that shape.
    """
    return tau.abs() > (total - tau).abs_().mul_(strictness)


def merge(
    base: Tensor, experts: Sequence[Tensor], parameters: ConsensusParameters, context: Context
) -> Merged:
    """Makes tau = scale * [at least k experts use it] * sum_i tau_i (Wang et al., ICML 2024).

    Args:
        base: floating point, any shape.
        experts: of the base's shape, floating point.
        parameters: lambda, k and the scale.
        context: not used.

    Returns:
        tau in float64.

    Raises:
        ValueError: shapes differ, or the lambdas are not as many as the experts.
    """
    check_shapes(base, experts)
    lambdas: PerExpert = parameters.lambdas
    start = base.double()
    vectors = [expert - start for expert in experts]
    total = ordered_sum(vectors)
    users = torch.zeros_like(total)
    for tau, strictness in zip(vectors, per_expert(lambdas, len(experts), "lambdas"), strict=True):
        users += tall_mask(tau, total, strictness)
    return Merged(total * (users >= parameters.agreement) * parameters.scale)


RULE = Rule(
    name="consensus",
    paper="Wang et al., Localizing task information (TALL masks), ICML 2024 (arXiv 2405.07813)",
    parameters=ConsensusParameters,
    merge=merge,
)
