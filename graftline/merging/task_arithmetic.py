"""Task arithmetic: the scaled sum of the task vectors."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

from graftline.merging.core import (
    Context,
    Merged,
    MergeParameters,
    Rule,
    check_shapes,
    ordered_sum,
)


class TaskArithmeticParameters(MergeParameters):
    """How far to go along the sum."""

    scale: float = Field(
        0.4, gt=0.0, le=10.0, description="the paper finds 0.3 to 0.5 near the best for many tasks"
    )


def merge(
    base: Tensor, experts: Sequence[Tensor], parameters: TaskArithmeticParameters, context: Context
) -> Merged:
    """Makes tau = scale * sum_i (theta_i - theta_0) (Ilharco et al., ICLR 2023).

    Args:
        base: floating point, any shape.
        experts: of the base's shape, floating point.
        parameters: the scale.
        context: not used.

    Returns:
        tau in float64.

    Raises:
        ValueError: there is no expert, or one has another shape.
    """
    check_shapes(base, experts)
    start = base.double()
    return Merged(ordered_sum([expert - start for expert in experts]).mul_(parameters.scale))


RULE = Rule(
    name="task-arithmetic",
    paper="Ilharco et al., Editing models with task arithmetic, ICLR 2023 (arXiv 2212.04089)",
    parameters=TaskArithmeticParameters,
    merge=merge,
)
