"""Products of bfloat16 layers on CPUs that multiply float32 faster."""

from __future__ import annotations

import threading
from typing import Any, cast

import torch
from torch import Tensor, nn

FEW = 64
"""Rows from which on a product is worth widening; below, reading the weights is the cost."""
_BLOCK = 1 << 20
"""Weights that are widened at a time: they stay in the cache until they are multiplied."""


def widen_products(backbone: nn.Module) -> None:
    """Has every bfloat16 linear layer take its products in float32, in place.

    Operands and results stay bfloat16, and sums were float32 before: what changes is the order of
    a sum, as between two machines. Masks, adapters and checkpoints see the same layers and names.
    """
    for module in backbone.modules():
        if type(module) is nn.Linear and module.weight.dtype == torch.bfloat16:
            module.__class__ = WidenedLinear


def multiply(
    layer: nn.Linear, rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor
) -> None:
    """Puts `rows @ weight.T + bias` into `out` as `layer` would with that weight; no gradient.

    Args:
        layer: whose way of taking products it is.
        rows: (rows, in).
        weight: (out, in).
        bias: (out,), or none.
        out: (rows, out).
    """
    if isinstance(layer, WidenedLinear) and _is_worth_widening(rows):
        _multiplied(rows, weight, out)
        if bias is not None:
            out += bias
    elif bias is None:
        torch.mm(rows, weight.t(), out=out)
    else:
        torch.addmm(bias, rows, weight.t(), out=out)


class WidenedLinear(nn.Linear):
    """A linear layer whose products of bfloat16 on a CPU are those of float32, rounded once."""

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Linear`: (..., in) -> (..., out)."""
        rows = input.reshape(-1, self.in_features)
        if not _is_worth_widening(rows):
            return super().forward(input)
        output = cast(Tensor, _Product.apply(rows, self.weight))  # type: ignore[no-untyped-call]
        output = output.view(*input.shape[:-1], -1)
        return output if self.bias is None else output + self.bias


class _Product(torch.autograd.Function):
    """`rows @ weight.T`, block by block of the weight's rows."""

    @staticmethod
    def forward(context: Any, rows: Tensor, weight: Tensor) -> Tensor:
        context.save_for_backward(rows, weight)
        return _multiplied(rows, weight, rows.new_empty(len(rows), len(weight)))

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        rows, weight = context.saved_tensors
        for_rows, for_weight = context.needs_input_grad
        wide = _widened("gradient", gradient)
        summed = _scratch("summed", *rows.shape).zero_() if for_rows else None
        wide_rows = _widened("rows", rows) if for_weight else None
        of_weight = torch.empty_like(weight) if for_weight else None
        for block in _blocks(weight):
            part, own = weight[block], wide[:, block]
            if summed is not None:
                summed.addmm_(own, _widened("weight", part))
            if wide_rows is not None and of_weight is not None:
                product = _scratch("product", *part.shape)
                torch.mm(own.t(), wide_rows, out=product)
                of_weight[block] = product
        return None if summed is None else summed.to(rows.dtype), of_weight


def _is_worth_widening(rows: Tensor) -> bool:
    return len(rows) >= FEW and rows.dtype == torch.bfloat16 and rows.device.type == "cpu"


def _multiplied(rows: Tensor, weight: Tensor, output: Tensor) -> Tensor:
    wide = _widened("rows", rows)
    for block in _blocks(weight):
        part = weight[block]
        product = _scratch("product", len(rows), len(part))
        torch.mm(wide, _widened("weight", part).t(), out=product)
        output[:, block] = product
    return output


def _blocks(weight: Tensor) -> list[slice]:
    rows = max(1, _BLOCK // weight.shape[1])
    return [slice(start, start + rows) for start in range(0, len(weight), rows)]


_kept = threading.local()


def _scratch(name: str, *shape: int) -> Tensor:
    """A float32 tensor of this thread whose memory serves again: new pages cost as much."""
    count = shape[0] * shape[1]
    held: Tensor | None = getattr(_kept, name, None)
    if held is None or held.numel() < count:
        # No inference tensor, even if inference asks first: training may use it later.
        with torch.inference_mode(False):
            # A model that another thread builds changes torch's default dtype meanwhile.
            held = torch.empty(count, dtype=torch.float32)
        setattr(_kept, name, held)
    return held[:count].view(shape)


def _widened(name: str, tensor: Tensor) -> Tensor:
    return _scratch(name, *tensor.shape).copy_(tensor)
