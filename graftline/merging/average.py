"""The plain average of the experts."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from graftline.merging.core import (
    Context,
    Merged,
    MergeParameters,
    Rule,
    check_shapes,
    ordered_sum,
)


class AverageParameters(MergeParameters):
    """The average has nothing to choose."""


def merge(
    base: Tensor, experts: Sequence[Tensor], parameters: AverageParameters, context: Context
) -> Merged:
    """Makes tau = (1/N) sum_i theta_i - theta_0 (Wortsman et al., ICML 2022: uniform soup).

    Args:
        base: floating point, any shape.
        experts: of the base's shape, floating point.
        parameters: none.
        context: not used.

    Returns:
        tau in float64. The base cancels out, so a zero base gives the experts' mean itself.

    Raises:
        ValueError: there is no expert, or one has another shape.
    """
    check_shapes(base, experts)
    if len({expert.dtype for expert in experts}) > 1:
        experts = [expert.double() for expert in experts]
    mean = ordered_sum(experts)
    mean /= len(experts)
    mean -= base
    return Merged(mean)


RULE = Rule(
    name="average",
    paper="Wortsman et al., Model soups, ICML 2022 (arXiv 2203.05482)",
    parameters=AverageParameters,
    merge=merge,
    uses_base=False,
)
