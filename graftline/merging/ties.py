"""TIES-Merging: trim, elect a sign, average what agrees with it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import hardshrink

from graftline.merging.core import (
    Block,
    Context,
    Merged,
    Rule,
    ScopedParameters,
    Statistics,
    Walk,
    gathered,
    ordered,
    statistics_of,
    task_vectors,
)
from graftline.merging.selection import order_statistics

THRESHOLD = "threshold"


class TiesParameters(ScopedParameters):
    """How much of each task vector stays, and how far to go along the result."""

    density: float = Field(0.2, gt=0.0, le=1.0, description="share kept of each task vector")
    scale: float = Field(1.0, gt=0.0, le=10.0, description="the paper's lambda, 0.8 to 2.5")


def magnitudes(block: Block) -> list[Tensor]:
    """|tau_i| of each expert, float32, in the block's shape."""
    return [tau.abs_() for tau in task_vectors(block.base, block.experts)]


def thresholds(walk: Walk, parameters: TiesParameters) -> Statistics:
    """The magnitude of the k-th largest element of each task vector, k = density * elements.

    The reference code keeps one element more (it cuts at the k+1-th); both keep all equals.
    """
    found = order_statistics(walk, magnitudes, lambda count: [round(parameters.density * count)])
    return {THRESHOLD: found[0] if found else ()}


def trimmed(tau: Tensor, threshold: float) -> Tensor:
    """Keeps tau where its magnitude reaches the threshold, else 0; float32, any shape."""
    if threshold <= 0.0:
        return tau
    # hardshrink keeps what is above its bound, so the bound is the next smaller float
    return hardshrink(tau, float(np.nextafter(np.float32(threshold), np.float32(0))))


def elected_mean(vectors: Sequence[Tensor], scale: float) -> Tensor:
    """Elects each element's sign by the sum and averages the elements that have it.

    An exact draw elects nobody: the element is 0, as the paper's formulas (sgn(0) = 0) say. The
    reference code gives a draw to the sign that most other elements elected.

    Args:
        vectors: trimmed task vectors, float32, one shape; zeros take no part.
        scale: what multiplies the mean, in float64.

    Returns:
        float32 in that shape, rounded once, the same for every order of the vectors.
    """
    if len(vectors) == 2 and scale == 1.0:
        return _elected_mean_of_two(*vectors)
    rows = ordered(vectors)
    direction = _elected(rows)
    voters = torch.zeros_like(direction)
    agreeing = []
    for row in rows:
        agreeing.append((row * direction).clamp_(min=0.0))  # its magnitude, or 0 if it disagrees
        voters += agreeing[-1].sign()
    mean = gathered(agreeing).div_(voters.clamp_(min=1.0))
    if scale != 1.0:
        mean.mul_(scale)
    return mean.float().mul_(direction).add_(0.0)  # no negative zero


def _elected_mean_of_two(left: Tensor, right: Tensor) -> Tensor:
    """The same without float64: a sum of two that rounds in float32 rounds but once.

    Where one vector alone has a vote the mean is the sum, so only elements with two, a few of a
    hundred at the paper's density, go to an election (`test_papers.py` compares with the general
    way). As there, a sum must lie within float32.
    """
    shape, left, right = left.shape, left.flatten(), right.flatten()
    mean = torch.add(left, right)
    both = np.flatnonzero((left.numpy() != 0) & (right.numpy() != 0))
    contested = slice(None) if 4 * len(both) > len(mean) else torch.from_numpy(both)
    mean[contested] = _mean_of_two_votes(left[contested], right[contested])
    return mean.view(shape).add_(0.0)


def _mean_of_two_votes(left: Tensor, right: Tensor) -> Tensor:
    direction = _elected((left, right))
    left = (left * direction).clamp_(min=0.0)
    right = (right * direction).clamp_(min=0.0)
    voters = torch.minimum(left, right).sign_().add_(1.0)  # 2 if both agree
    return left.add_(right).div_(voters).mul_(direction)


def _elected(rows: Sequence[Tensor]) -> Tensor:
    """The sign of each element's sum, float32: that of a sum of two is right however it rounds."""
    if len(rows) == 2:
        return torch.add(*rows).sign_()
    return gathered(rows).sign_().float()


def merge(
    base: Tensor, experts: Sequence[Tensor], parameters: TiesParameters, context: Context
) -> Merged:
    """Makes tau = scale * (disjoint mean of trimmed task vectors) (Yadav et al., NeurIPS 2023).

    The scope is global as in the reference code, here as on disk: the share that stays is then
    the largest of the whole model, and whole tensors may go. `scope="tensor"` is what PEFT and
    mergekit do; it costs the same arithmetic, and one reading of the files instead of two.

    Args:
        base: floating point, any shape.
        experts: of the base's shape, floating point.
        parameters: density, scale and scope.
        context: its statistics hold each expert's threshold.

    Returns:
        tau in float32.

    Raises:
        ValueError: shapes differ, or a global scope comes without statistics.
    """
    found = statistics_of(thresholds, base, experts, parameters, context)[THRESHOLD]
    vectors = [
        trimmed(tau, bound)
        for tau, bound in zip(
            task_vectors(base, experts), found or (0.0,) * len(experts), strict=True
        )
    ]
    return Merged(elected_mean(vectors, parameters.scale))


RULE = Rule(
    name="ties",
    paper="Yadav et al., TIES-Merging, NeurIPS 2023 (arXiv 2306.01708)",
    parameters=TiesParameters,
    merge=merge,
    gather=thresholds,
)
