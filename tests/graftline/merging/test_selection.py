"""The k-th largest against sorting, on values made to mislead a histogram."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from graftline.merging.core import Block, Found, Walk
from graftline.merging.selection import order_statistics
from graftline.merging.ties import TiesParameters, thresholds, trimmed

ANY = st.floats(width=32, allow_nan=False, allow_infinity=False)
TINY = 2.0**-149  # the smallest subnormal


def walk_in_steps(
    values: Tensor, step: int, together: int = 2, seen: list[str] | None = None
) -> Walk:
    """Blocks of `step` values, some of them in a run; the expert is the values, the base 0.

    A sample is every third block; what was walked over is noted in `seen`.
    """
    blocks = [
        Block(torch.zeros(piece.shape), (piece,), values.numel()) for piece in values.split(step)
    ]

    def walk(work, /, *, sparse: bool = False) -> list[Found]:
        if seen is not None:
            seen.append("sample" if sparse else "all")
        if sparse:
            return [work(blocks[::3])]
        return [work(blocks[i : i + together]) for i in range(0, len(blocks), together)]

    return walk


@given(st.lists(ANY, min_size=1, max_size=40), st.integers(1, 40), st.integers(1, 7))
@example([0.0, -0.0, 0.0, -0.0], 2, 1)
@example([TINY, -TINY, 2 * TINY, 0.0], 3, 2)
@example([5.0] * 9, 4, 2)
def test_order_statistics_are_exact(values, rank, step):
    found = order_statistics(
        walk_in_steps(torch.tensor(values), step),
        lambda block: [block.experts[0], -block.experts[0]],
        lambda count: [rank, count],
    )
    rank = min(rank, len(values))
    assert found[0] == (sorted(values)[-rank], sorted(-v for v in values)[-rank])
    assert found[1] == (min(values), -max(values))


def misleading(kind: str) -> Tensor:
    """20,000 values."""
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(20_000, generator=generator)
    return {
        "normal": normal,
        "all equal": torch.full((20_000,), 0.0123),
        "zeros": torch.zeros(20_000),
        "zeros of both signs": torch.zeros(20_000) * normal.sign(),
        "subnormals": (normal.abs() * 1000).round() * TINY,
        "from subnormal to huge": normal.sign() * 2.0 ** (60 * normal).clamp(-140, 127),
        "one value among zeros": torch.eye(1, 20_000).flatten(),
        "bf16 differences": (0.02 * normal).bfloat16().float()
        - (0.02 * normal + 0.001 * normal.flip(0)).bfloat16().float(),
        "neighbours in float32": (torch.randint(0, 9, (20_000,), generator=generator) + 2**23)
        .int()
        .view(torch.float32),
        "sorted": normal.sort().values,
        "large first": torch.cat([100 + normal[:2000].abs(), 0.01 * normal[2000:]]),
        "large last": torch.cat([0.01 * normal[2000:], 100 + normal[:2000].abs()]),
    }[kind]


KINDS = [
    "normal",
    "all equal",
    "zeros",
    "zeros of both signs",
    "subnormals",
    "from subnormal to huge",
    "one value among zeros",
    "bf16 differences",
    "neighbours in float32",
    "sorted",
    "large first",
    "large last",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [64, 3000, 20_000])
def test_the_kept_set_is_that_of_a_sort(kind, step):
    values = misleading(kind)
    magnitudes = values.abs()
    for density in (0.0001, 0.2, 0.9, 1.0):
        found = thresholds(walk_in_steps(values, step), TiesParameters(density=density))
        keep = max(1, round(density * values.numel()))
        kth = magnitudes.kthvalue(values.numel() - keep + 1).values.item()
        assert found == {"threshold": (kth,)}
        kept = trimmed(values, kth)
        assert torch.equal(kept, torch.where(magnitudes >= kth, values, 0.0))
        assert torch.equal(magnitudes.sort(descending=True).values[keep - 1], torch.tensor(kth))


@given(st.integers(0, 2**32 - 1), st.integers(1, 500), st.sampled_from([1, 17, 500]))
@settings(max_examples=30, deadline=None)
def test_any_bits_in_any_steps(seed, rank, step):
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**31), 2**31, (500,), generator=generator).int()
    values = bits.view(torch.float32)
    values = torch.where(values.isfinite(), values, 0.0)
    found = order_statistics(
        walk_in_steps(values, step), lambda block: block.experts, lambda _: [rank]
    )
    assert found == [(values.sort(descending=True).values[rank - 1].item(),)]


@pytest.mark.parametrize(
    ("kind", "density", "walks"),
    [
        ("normal", 0.2, ["sample", "all"]),
        ("normal", 1.0, ["sample", "all", "all"]),  # no sample tells the smallest
        ("sorted", 0.2, ["sample", "all"]),
        ("one large block", 0.2, ["sample", "all", "all", "all"]),  # which the sample does not hold
    ],
)
def test_a_sample_saves_a_walk_and_never_misleads(kind, density, walks):
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(3_000_000, generator=generator)
    if kind == "sorted":
        values = values.sort().values
    if kind == "one large block":
        values[10_000:20_000] += 100
        values = torch.cat([values[:30_000]] * 100)
    seen: list[str] = []
    walk = walk_in_steps(values, 10_000, seen=seen)
    found = thresholds(walk, TiesParameters(density=density))
    assert seen == walks
    keep = round(density * values.numel())
    assert found == {"threshold": (values.abs().sort(descending=True).values[keep - 1].item(),)}
