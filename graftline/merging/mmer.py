"""MMER: TIES' task vector, and a mask an expert that takes its own part out of it again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from torch import Tensor

from graftline.merging import ties
from graftline.merging.core import (
    Context,
    Merged,
    PerExpert,
    Rule,
    per_expert,
    task_vectors,
)

Factor = Annotated[float, Field(gt=0.0, le=10.0)]


class MmerParameters(ties.TiesParameters):
    """TIES' parameters and those of the masks; the paper chooses all on a validation split."""

    lambdas: Factor | tuple[Factor, ...] = Field(
        1.0, description="strictness of the masks, one or one an expert; 1 is L1-optimal"
    )
    alphas: Factor | tuple[Factor, ...] = Field(
        1.0, description="what multiplies a masked task vector, one or one an expert"
    )


def mask(tau: Tensor, merged: Tensor, strictness: float) -> Tensor:
    """Where sign(tau_i) = sign(tau*) and |tau_i| >= lambda_i |tau* - tau_i|.

    For lambda = 1 this minimises the L1 distance between the expert and base + mask * tau*
    (Li et al., ACL 2025, eq. 2). Below 1 the inequality alone would let small elements of the
    other direction in, hence the test of the sign.

    Args:
        tau: an expert's task vector, float32.
        merged: tau*, float32, same shape.
        strictness: lambda_i.

    Returns:
        bool in that shape.
    """
    own = tau.double()
    near = own.abs() >= (merged - own).abs_().mul_(strictness)
    return near.logical_and_(tau.sign() == merged.sign())


def merge(
    base: Tensor, experts: Sequence[Tensor], parameters: MmerParameters, context: Context
) -> Merged:
    """Makes tau* = TIES(tau_1..tau_N) and a mask an expert (Li et al., ACL 2025).

    Args:
        base: floating point, any shape.
        experts: of the base's shape, floating point.
        parameters: TIES' density, scale and scope; lambdas and alphas.
        context: its statistics hold each expert's threshold, as for TIES.

    Returns:
        tau* in float32, a mask an expert, and the alphas as scales.

    Raises:
        ValueError: shapes differ, a global scope comes without statistics, or lambdas or alphas
            are not as many as the experts.
    """
    lambdas: PerExpert = parameters.lambdas
    strictness = per_expert(lambdas, len(experts), "lambdas")
    alphas: PerExpert = parameters.alphas
    scales = per_expert(alphas, len(experts), "alphas")
    merged = ties.merge(base, experts, parameters, context).tau
    masks = tuple(
        mask(tau, merged, bound)
        for tau, bound in zip(task_vectors(base, experts), strictness, strict=True)
    )
    return Merged(merged, masks, scales)


RULE = Rule(
    name="mmer",
    paper="Li et al., Multi-Modality Expansion and Retention, ACL 2025 (arXiv 2505.17110)",
    parameters=MmerParameters,
    merge=merge,
    gather=ties.thresholds,
    one_per_expert=True,
)
