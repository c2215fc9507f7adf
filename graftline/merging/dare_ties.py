"""DARE with TIES' sign election: drop at random, rescale, average what agrees."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from graftline.merging.core import Context, Merged, MergeParameters, Rule, task_vectors
from graftline.merging.ties import elected_mean

_STEP, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


class DareTiesParameters(MergeParameters):
    """How much is dropped, and how far to go along the result."""

    drop: float = Field(0.9, ge=0.0, lt=1.0, description="share dropped at random (the paper's p)")
    scale: float = Field(1.0, gt=0.0, le=10.0)


def drop_mask(count: int, drop: float, index: int, context: Context) -> Tensor:
    """Which elements of a piece stay: a function of seed, name, expert's place and position.

    Args:
        count: elements in the piece.
        drop: probability of going, in steps of 2**-53.
        index: the expert's place among the experts.
        context: seed, the tensor's name and the piece's place in the tensor.

    Returns:
        bool, shape (count,).
    """
    words = f"{context.seed}\0{context.name}\0{index}".encode()
    key = int.from_bytes(hashlib.sha256(words).digest()[:8], "little")
    # SplitMix64 (Steele et al., OOPSLA 2014): a number's place alone decides it, so a piece in
    # the middle of a tensor needs nothing that comes before it
    state = np.arange(context.offset, context.offset + count, dtype=np.uint64)
    state *= np.uint64(_STEP)
    state += np.uint64(key)
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        state ^= state >> np.uint64(shift)
        state *= np.uint64(factor)
    state ^= state >> np.uint64(31)
    return torch.from_numpy(state >= np.uint64(int(drop * 2**64)))


def merge(
    base: Tensor, experts: Sequence[Tensor], parameters: DareTiesParameters, context: Context
) -> Merged:
    """Makes tau = scale * disjoint mean of m_i * tau_i / (1 - p) (Yu et al., ICML 2024).

    After dropping, signs are elected and agreeing elements averaged as in TIES; nothing is
    trimmed by magnitude.

    Args:
        base: floating point, any shape.
        experts: of the base's shape, floating point; their order chooses the random numbers.
        parameters: drop rate and scale.
        context: seed, name and offset choose the random numbers.

    Returns:
        tau in float32.

    Raises:
        ValueError: there is no expert, or one has another shape.
    """
    vectors = []
    for index, tau in enumerate(task_vectors(base, experts)):
        stays = drop_mask(tau.numel(), parameters.drop, index, context).view(tau.shape)
        vectors.append(tau * stays)
    factor = parameters.scale / (1.0 - parameters.drop)
    return Merged(elected_mean(vectors, factor))


RULE = Rule(
    name="dare-ties",
    paper="Yu et al., Language models are super Mario (DARE), ICML 2024 (arXiv 2311.03099)",
    parameters=DareTiesParameters,
    merge=merge,
    symmetric=False,
)
