"""MERA's merge with another coefficient than 1/i, the same for all layers or growing with depth.

`theta_i = theta_{i-1} + c_l (theta_i^v - theta_{i-1})` for layer l of L, where

    c_l = clip(c (1 + depth (2 l / (L - 1) - 1)), 0, 1).

With `depth` above 0 late layers, which write, take more of the new model than early ones, which
read; below 0 it is the other way round. The mean over layers stays c where nothing is clipped.
Weights before the first layer count as layer 0, those behind the last as layer L - 1 [ours].
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from graftline.merging.backbones import WEIGHTS, CannotMerge

_LAYER = re.compile(r"\.layers\.(\d+)\.")
_BEFORE = "embed_tokens"


def layer_coefficient(layer: int, layers: int, coefficient: float, depth: float) -> float:
    """c_l, by the formula above; the coefficient itself where there is one layer only."""
    place = 2 * layer / (layers - 1) - 1 if layers > 1 else 0.0
    return min(1.0, max(0.0, coefficient * (1 + depth * place)))


def weighted_average(previous: Tensor, vanilla: Tensor, coefficient: float) -> Tensor:
    """`previous + coefficient (vanilla - previous)` in float64, rounded once.

    Args:
        previous: a tensor of theta_{i-1}, floating point.
        vanilla: the tensor of that name in theta_i^v, same shape and dtype.
        coefficient: from 0 to 1.

    Returns:
        A tensor in the dtype of `previous`. Elements that are equal in both stay bit-identical.

    Raises:
        ValueError: shapes or dtypes differ, or the coefficient is not from 0 to 1.
    """
    if not 0.0 <= coefficient <= 1.0:
        raise ValueError(f"a coefficient is from 0 to 1, not {coefficient}")
    if previous.shape != vanilla.shape or previous.dtype != vanilla.dtype:
        raise ValueError(
            f"{tuple(previous.shape)} {previous.dtype} and {tuple(vanilla.shape)} {vanilla.dtype} "
            "cannot be averaged"
        )
    total = previous.double()
    merged = (total + (vanilla.double() - total) * coefficient).to(previous.dtype)
    return torch.where(previous == vanilla, previous, merged)


def merge_weighted(
    previous: Path, vanilla: Path, coefficient: float, depth: float, out: Path
) -> dict[str, float]:
    """Writes theta_i beside the previous model's own configuration and tokenizer.

    Args:
        previous: `transformers` folder of theta_{i-1}.
        vanilla: `transformers` folder of theta_i^v.
        coefficient: c.
        depth: slope over the layers.
        out: folder to fill; must not exist.

    Returns:
        The coefficient of each tensor.

    Raises:
        CannotMerge: names the tensors that do not fit or are not finite; nothing is written then.
    """
    with (
        safe_open(previous / WEIGHTS, framework="pt") as old,
        safe_open(vanilla / WEIGHTS, framework="pt") as new,
    ):
        names = sorted(old.keys())
        if names != sorted(new.keys()):
            odd = ", ".join(sorted(set(names) ^ set(new.keys()))[:5])
            raise CannotMerge(f"{previous} and {vanilla} hold different tensors: {odd}")
        numbers = [int(found[1]) for name in names if (found := _LAYER.search(name))]
        layers = max(numbers, default=0) + 1
        used: dict[str, float] = {}
        merged: dict[str, Tensor] = {}
        for name in names:
            used[name] = layer_coefficient(_layer_of(name, layers), layers, coefficient, depth)
            try:
                tensors = old.get_tensor(name), new.get_tensor(name)
                merged[name] = weighted_average(*tensors, used[name])
            except ValueError as error:
                raise CannotMerge(f"{name} in {previous} and {vanilla}: {error}") from error
            if not all(bool(tensor.isfinite().all()) for tensor in tensors):
                raise CannotMerge(f"{name} in {previous} or {vanilla} holds NaN or infinity")
    out.mkdir(parents=True)
    for file in sorted(previous.iterdir()):
        if file.name != WEIGHTS:
            shutil.copyfile(file, out / file.name)
    save_file(merged, out / WEIGHTS, metadata={"format": "pt"})
    return used


def _layer_of(name: str, layers: int) -> int:
    found = _LAYER.search(name)
    if found:
        return int(found[1])
    return 0 if _BEFORE in name else layers - 1
