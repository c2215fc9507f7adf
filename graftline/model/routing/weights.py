"""A modality's weights for routed inference: full, masked at one bit a parameter, or low-rank.

A masked weight is unpacked by looking up each byte in a table of its eight bits and one fused
multiply-add, into a buffer that all layers share. The correction `W x + (difference) x` would need
the same unpacked matrix and one more product, and picking bits by shifts takes three times as long.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from graftline.errors import GraftlineError


@dataclass(frozen=True)
class DenseWeight:
    """A parameter of an expert as it is (`route` of fully fine-tuned experts).

    Attributes:
        weight: the parameter, in the backbone's dtype and on its device.
    """

    weight: Tensor

    def dense(self) -> Tensor:
        """The parameter itself."""
        return self.weight

    def check(self, name: str, like: Tensor) -> None:
        """Refuses a weight that does not fit the backbone's parameter `like`."""
        _check_tensor(f"{name}: the weight", self.weight, tuple(like.shape), like)


@dataclass(frozen=True)
class MaskedWeight:
    """`base + scale * mask * delta`: MMER's decoupled weight (arXiv 2505.17110, eq. 2).

    `base` and `delta` are meant to be the same tensors for all modalities; none is copied.

    Attributes:
        base: the parameter of theta_0.
        delta: the merged task vector tau* of the parameter, in the dtype and shape of `base`.
        mask: uint8, `numpy.packbits` of the parameter's mask in row-major order.
        scale: alpha of the modality.
    """

    base: Tensor
    delta: Tensor
    mask: Tensor
    scale: float = 1.0

    def dense(self) -> Tensor:
        """The parameter, computed in float32 and rounded once; in new memory."""
        return self.unpack(self.base.new_empty(8 * len(self.mask)))

    def unpack(self, scratch: Tensor) -> Tensor:
        """The parameter as a view of `scratch`: (at least 8 * mask bytes,), dtype of `base`."""
        bits = scratch[: 8 * len(self.mask)]
        table = _bit_table(self.base.dtype, self.base.device)
        # In bf16 eight values are moved as one of 16 bytes: two thirds of the time.
        pieces = _wide(bits).view(-1, *table.shape[1:])
        torch.index_select(table, 0, self.mask.int(), out=pieces)
        weight = bits[: self.base.numel()].view(self.base.shape)
        return torch.addcmul(self.base, weight, self.delta, value=self.scale, out=weight)

    def check(self, name: str, like: Tensor) -> None:
        """Refuses a weight that does not fit the backbone's parameter `like`."""
        shape = tuple(like.shape)
        _check_tensor(f"{name}: the base", self.base, shape, like)
        _check_tensor(f"{name}: the task vector", self.delta, shape, like)
        expected = (like.numel() + 7) // 8
        if self.mask.dtype != torch.uint8 or self.mask.shape != (expected,):
            raise GraftlineError(
                f"{name}: the mask is {self.mask.dtype} {tuple(self.mask.shape)}, but "
                f"{like.numel()} parameters are packed into torch.uint8 ({expected},). Make it "
                "with numpy.packbits from this parameter's own mask."
            )
        if self.mask.device != like.device:
            raise GraftlineError(f"{name}: the mask is on {self.mask.device}, not {like.device}.")


@dataclass(frozen=True)
class LowRankWeight:
    """`base + scale * up @ down`: an expert's LoRA adapter, kept apart (Hu et al., 2021).

    Where `base` is the backbone's own parameter, all tokens share one product with it.

    Attributes:
        base: what the adapter was trained beside, (out, in).
        down: LoRA's A, (rank, in).
        up: LoRA's B, (out, rank).
        scale: LoRA's alpha / rank.
    """

    base: Tensor
    down: Tensor
    up: Tensor
    scale: float = 1.0

    def dense(self) -> Tensor:
        """The parameter, computed in float32 and rounded once; in new memory."""
        product = self.up.float() @ self.down.float()
        return (self.base.float() + self.scale * product).to(self.base.dtype)

    def add_to(self, output: Tensor, rows: Tensor) -> None:
        """Adds the adapter's part for `rows` (tokens, in) to `output` (tokens, out), in place."""
        output.addmm_(rows @ self.down.t(), self.up.t(), alpha=self.scale)

    def check(self, name: str, like: Tensor) -> None:
        """Refuses a weight that does not fit the backbone's parameter `like`."""
        if like.dim() != 2:
            raise GraftlineError(f"{name}: has no rows and columns, so no adapter can stand there.")
        rank = self.down.shape[0]
        _check_tensor(f"{name}: the base", self.base, tuple(like.shape), like)
        _check_tensor(f"{name}: the adapter's A", self.down, (rank, like.shape[1]), like)
        _check_tensor(f"{name}: the adapter's B", self.up, (like.shape[0], rank), like)


Weight = DenseWeight | MaskedWeight | LowRankWeight


def _check_tensor(what: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    if tuple(tensor.shape) != shape:
        raise GraftlineError(
            f"{what} has shape {tuple(tensor.shape)}, expected {shape}. It belongs to another "
            "backbone or parameter."
        )
    if tensor.dtype != like.dtype or tensor.device != like.device:
        raise GraftlineError(
            f"{what} is {tensor.dtype} on {tensor.device}, the backbone is {like.dtype} on "
            f"{like.device}. Convert it once and share it between modalities."
        )
    if not tensor.is_contiguous():
        raise GraftlineError(f"{what} is not contiguous; pass tensor.contiguous().")


@lru_cache(maxsize=8)
def _bit_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Each byte's eight bits, first bit first, as values of `dtype`.

    In pieces of 16 bytes: (256,) where one holds eight values, else (256, pieces).
    """
    bytes_, shifts = torch.arange(256, device=device)[:, None], torch.arange(7, -1, -1)
    bits = (bytes_ >> shifts.to(device)) & 1
    return _wide(bits.to(dtype).flatten()).view(256, -1).squeeze(1)


def _wide(values: Tensor) -> Tensor:
    """The same memory as complex128; `values` is flat and a multiple of eight long."""
    return torch.view_as_complex(values.view(torch.float64).view(-1, 2))
