"""Small models, and what a rule makes of them, for the tests of rules."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st

from graftline.merging.core import Context, Merged
from graftline.merging.rules import parameters_for, rule_named

ANY = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)
TAME = st.integers(-256, 256).map(lambda n: n / 64)  # sums of some are exact in float32
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def parameters_of(name: str, experts: int = 2, **values):
    if "scope" in rule_named(name).parameters.model_fields:
        values.setdefault("scope", "tensor")
    return parameters_for(rule_named(name), values, experts)


def merged_by(name: str, base, experts, context=Context(name="w"), **values) -> Merged:
    rule = rule_named(name)
    return rule.merge(base, experts, parameters_of(name, len(experts), **values), context)


def models_of(rows: list[tuple[float, ...]], dtype=torch.float32):
    columns = torch.tensor(rows, dtype=torch.float64).T.to(dtype)
    return columns[0].contiguous(), [column.contiguous() for column in columns[1:]]


def random_models(count: int, size: int = 500, dtype=torch.bfloat16, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    base = (torch.randn(size, generator=generator) * 0.02).to(dtype)
    moves = [torch.randn(size, generator=generator) * 0.004 for _ in range(count)]
    return base, [(base.float() + move).to(dtype) for move in moves]


def taus_of(base, experts) -> np.ndarray:
    return np.stack([(e.double() - base.double()).numpy() for e in experts])


def nearest(values: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """Rounds float64 once: of all values that a 16-bit dtype has, the nearest, halves to even."""
    if dtype == torch.float32:
        return torch.from_numpy(values.astype(np.float32))
    all_values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    all_values = all_values[torch.isfinite(all_values)]
    grid, order = all_values.double().sort(stable=True)
    target = torch.from_numpy(np.ascontiguousarray(values))
    above = torch.searchsorted(grid, target).clamp(1, len(grid) - 1)
    low, high = target - grid[above - 1], grid[above] - target
    even = all_values[order[above - 1]].view(torch.int16) & 1 == 0
    down = (low < high) | ((low == high) & even)
    return all_values[order[torch.where(down, above - 1, above)]]


# --- rounding and sums ---------------------------------------------------------------------
