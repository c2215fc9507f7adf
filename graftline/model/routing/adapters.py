"""Experts kept apart as low-rank products beside theta_0 (LoRA: Hu et al., 2021).

An expert that was fine-tuned with LoRA of rank r is theta_0 plus a product of that rank in every
linear layer, and is kept whole up to rounding. Of one that was fine-tuned in full this keeps the
nearest product (Eckart & Young, 1936). Norms are kept as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from graftline.model.routing.layers import routable_parameters
from graftline.model.routing.weights import DenseWeight, LowRankWeight, Weight

FILE = "adapters.safetensors"
_WEIGHTS = "model.safetensors"


def write_adapters(
    base: Any, expert: Path, rank: int, out: Path, progress: Callable[[], None] | None = None
) -> None:
    """Writes what sets an expert apart from theta_0.

    Args:
        base: theta_0, a causal LM in memory.
        expert: `transformers` folder of the expert's backbone.
        rank: of the product in each linear layer; less where a layer is smaller.
        out: folder that gets `adapters.safetensors`: `<weight>.up` (out, rank) and `<weight>.down`
            (rank, in) for each linear layer, and each norm, in theta_0's dtype.
        progress: called after each weight.
    """
    tensors: dict[str, Tensor] = {}
    with safe_open(expert / _WEIGHTS, framework="pt") as file:
        for name in routable_parameters(base):
            start = base.get_parameter(name).detach().cpu()
            tuned = file.get_tensor(name)
            if start.dim() == 2:
                up, down = low_rank(tuned.double() - start.double(), rank)
                tensors[f"{name}.up"] = up.to(start.dtype).contiguous()
                tensors[f"{name}.down"] = down.to(start.dtype).contiguous()
            else:
                tensors[name] = tuned.to(start.dtype)
            if progress is not None:
                progress()
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / FILE)


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The nearest product of two factors, in the Frobenius norm.

    By the eigenvectors of the smaller Gram matrix, which is enough for the leading directions.

    Args:
        matrix: float64 (out, in).
        rank: of the product.

    Returns:
        float64 (out, rank) and (rank, in); of a smaller rank where the matrix has no more.
    """
    wide = matrix.shape[1] > matrix.shape[0]
    tall = matrix.t() if wide else matrix
    rank = min(rank, tall.shape[1])
    _, vectors = torch.linalg.eigh(tall.t() @ tall)  # ascending
    leading = vectors[:, -rank:]
    left, right = tall @ leading, leading.t()
    return (right.t(), left.t()) if wide else (left, right)


def read_adapters(folder: Path, starts: Mapping[str, Tensor]) -> dict[str, Weight]:
    """Reads what `write_adapters` wrote.

    Args:
        folder: where.
        starts: name -> theta_0's parameter.
    """
    tensors = load_file(folder / FILE)
    weights: dict[str, Weight] = {}
    for name, start in starts.items():
        if f"{name}.up" in tensors:
            up, down = (tensors[f"{name}.{part}"].to(start.device) for part in ("up", "down"))
            weights[name] = LowRankWeight(start, down, up)
        else:
            weights[name] = DenseWeight(tensors[name].to(start.device))
    return weights
