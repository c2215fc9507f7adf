"""PCB-Merging: parameters compete within and between experts; the winners are averaged."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from graftline.merging.core import (
    Context,
    Merged,
    Rule,
    ScopedParameters,
    Statistics,
    Walk,
    ordered_sum,
    statistics_of,
    task_vectors,
)
from graftline.merging.selection import order_statistics
from graftline.merging.ties import magnitudes

_OUTLIERS = 0.0001  # share at both ends of the magnitudes that the reference code clips


class PcbParameters(ScopedParameters):
    """How many scores count, and how far to go along the result."""

    ratio: float = Field(0.1, gt=0.0, le=1.0, description="share of the best scores that count")
    scale: float = Field(1.2, gt=0.0, le=10.0, description="the paper's lambda")


def competition(walk: Walk, parameters: PcbParameters) -> Statistics:
    """Each expert's clipping bounds of magnitudes, its score threshold and its best score."""
    bounds = order_statistics(
        walk,
        magnitudes,
        lambda count: [count - int(count * _OUTLIERS), count - int(count * (1 - _OUTLIERS) - 1)],
    )
    if not bounds:
        return {"low": (), "high": (), "threshold": (), "best": ()}
    low, high = bounds
    found = order_statistics(
        walk,
        lambda block: scores(task_vectors(block.base, block.experts), low, high),
        lambda count: [count - int(count * (1 - parameters.ratio)), 1],
    )
    return {"low": low, "high": high, "threshold": found[0], "best": found[1]}


def scores(vectors: Sequence[Tensor], low: Sequence[float], high: Sequence[float]) -> list[Tensor]:
    """Scores exp(N norm(|tau_i|)^2) * tanh(tau_i sum_j tau_j) (Du et al., NeurIPS 2024).

    Args:
        vectors: task vectors, float32, one shape.
        low: each expert's smallest magnitude that counts; below it is raised to it.
        high: each expert's largest one.

    Returns:
        float32 in that shape, one an expert.
    """
    total = ordered_sum(vectors)
    found = []
    for tau, least, most in zip(vectors, low, high, strict=True):
        span = most - least
        within = tau.double().abs_().clamp_(least, most).sub_(least).div_(span if span > 0 else 1)
        found.append((within.square_().mul_(len(vectors)).exp_() * (tau * total).tanh_()).float())
    return found


def merge(
    base: Tensor, experts: Sequence[Tensor], parameters: PcbParameters, context: Context
) -> Merged:
    """Makes tau = scale * sum_i s_i tau_i / sum_i s_i (Du et al., NeurIPS 2024, reference code).

    s_i are the scores above the threshold, stretched to 0..1; the tau_i in the sum have their
    outlying magnitudes clipped.

    Args:
        base: floating point, any shape.
        experts: of the base's shape, floating point.
        parameters: ratio, scale and scope.
        context: its statistics come from `competition`.

    Returns:
        tau in float32.

    Raises:
        ValueError: shapes differ, or a global scope comes without statistics.
    """
    known = statistics_of(competition, base, experts, parameters, context)
    vectors = task_vectors(base, experts)
    if not known["low"]:  # not one element in the model
        return Merged(torch.zeros_like(base, dtype=torch.float32))
    weights, weighted = [], []
    for index, score in enumerate(scores(vectors, known["low"], known["high"])):
        threshold, best = known["threshold"][index], known["best"][index]
        span = best - threshold
        weight = score.double().clamp_(min=threshold).sub_(threshold).div_(span if span > 0 else 1)
        tau = vectors[index]
        clipped = tau.double().abs_().clamp_(known["low"][index], known["high"][index])
        weights.append(weight)
        weighted.append(clipped.mul_(tau.sign()).mul_(weight))
    share = ordered_sum(weights).clamp_(min=1e-12)
    return Merged(ordered_sum(weighted).div_(share).mul_(parameters.scale).float())


RULE = Rule(
    name="pcb",
    paper="Du et al., Parameter Competition Balancing, NeurIPS 2024 (arXiv 2410.02396)",
    parameters=PcbParameters,
    merge=merge,
    gather=competition,
)
