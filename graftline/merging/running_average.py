"""The running average: MERA's merge (Zhang et al., EMNLP 2025, eq. 4.1)."""

from __future__ import annotations

import torch
from torch import Tensor


def running_average(previous: Tensor, vanilla: Tensor, stage: int) -> Tensor:
    """theta_i = (i-1)/i * theta_{i-1} + 1/i * theta_i^v, gathered in float64 and rounded once.

    Args:
        previous: a tensor of theta_{i-1}, floating point.
        vanilla: the tensor of that name in theta_i^v, same shape and dtype.
        stage: i, from 1.

    Returns:
        The merged tensor in the dtype of `previous`. Elements that are equal in both inputs stay
        bit-identical.

    Raises:
        ValueError: shapes or dtypes differ, or the stage is below 1.
    """
    if stage < 1:
        raise ValueError(f"stages count from 1, not {stage}")
    if previous.shape != vanilla.shape or previous.dtype != vanilla.dtype:
        raise ValueError(
            f"{tuple(previous.shape)} {previous.dtype} and {tuple(vanilla.shape)} {vanilla.dtype} "
            "cannot be averaged"
        )
    total = previous.double()
    merged = (total + (vanilla.double() - total) / stage).to(previous.dtype)
    return torch.where(previous == vanilla, previous, merged)
