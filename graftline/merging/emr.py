"""EMR-Merging: elect one task vector, mask and rescale it for each expert."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from graftline.merging.core import (
    Block,
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

SCALE = "scale"


class EmrParameters(ScopedParameters):
    """EMR-Merging has no parameters; the scope says what the rescalers are taken over."""


def elected(vectors: Sequence[Tensor]) -> Tensor:
    """The largest magnitude among the elements that have the sign of the mean, with that sign.

    Args:
        vectors: task vectors, float32, one shape.

    Returns:
        float32 in that shape; 0 where the mean is 0.
    """
    sign = ordered_sum(vectors).sign_().float()
    largest = torch.zeros_like(sign)
    for vector in vectors:
        largest = torch.maximum(largest, vector * sign)
    return largest.mul_(sign)


def masks_of(vectors: Sequence[Tensor], unified: Tensor) -> tuple[Tensor, ...]:
    """Makes mask_i = (tau_i and the elected vector have one sign); bool, in the vectors' shape."""
    sign = unified.sign()
    return tuple(vector.sign() * sign > 0 for vector in vectors)


def rescalers(walk: Walk, parameters: EmrParameters) -> Statistics:
    """Takes scale_i = sum over tensors of mean|tau_i| / sum over tensors of mean|mask_i * tau|.

    As the reference code, which weighs each tensor alike, however large it is.
    """
    found = [pair for run in walk(_both_magnitudes) for pair in run]
    scales = []
    for expert in zip(*found, strict=True):
        # fsum is exact, so the order of the blocks does not matter
        below = math.fsum(kept for _, kept in expert)
        scales.append(math.fsum(own for own, _ in expert) / below if below > 0.0 else 1.0)
    return {SCALE: tuple(scales)}


def _both_magnitudes(blocks: Iterable[Block]) -> list[list[tuple[float, float]]]:
    """A block's part of mean|tau_i| and of mean|mask_i * tau|, for each expert."""
    found = []
    for block in blocks:
        vectors = task_vectors(block.base, block.experts)
        unified = elected(vectors)
        pairs = zip(vectors, masks_of(vectors, unified), strict=True)
        found.append(
            [
                (_magnitude(own) / block.size, _magnitude(unified * mask) / block.size)
                for own, mask in pairs
            ]
        )
    return found


def _magnitude(values: Tensor) -> float:
    """The sum of absolute values; numpy's, which does not depend on the number of threads."""
    return float(np.add.reduce(values.abs().flatten().numpy(), dtype=np.float64))


def merge(
    base: Tensor, experts: Sequence[Tensor], parameters: EmrParameters, context: Context
) -> Merged:
    """Elects tau, masks and rescalers (Huang et al., NeurIPS 2024).

    Args:
        base: floating point, any shape.
        experts: of the base's shape, floating point.
        parameters: the scope.
        context: its statistics hold each expert's rescaler.

    Returns:
        tau in float32, a mask and a scale an expert.

    Raises:
        ValueError: shapes differ, or a global scope comes without statistics.
    """
    scales = statistics_of(rescalers, base, experts, parameters, context)[SCALE]
    vectors = task_vectors(base, experts)
    unified = elected(vectors)
    return Merged(unified, masks_of(vectors, unified), scales)


RULE = Rule(
    name="emr",
    paper="Huang et al., EMR-Merging, NeurIPS 2024 (arXiv 2405.17461)",
    parameters=EmrParameters,
    merge=merge,
    gather=rescalers,
    one_per_expert=True,
)
