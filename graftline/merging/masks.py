"""Masks at one bit a parameter: packing, files, and what they cost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from graftline.errors import GraftlineError
from graftline.merging.core import rounded_once

SHAPES = "shapes"


class DamagedMasks(GraftlineError):
    """A file of masks that cannot be read, or whose masks do not fit their shapes."""


def pack(mask: Tensor) -> Tensor:
    """Packs eight elements into a byte, the first into its highest bit (numpy's packbits).

    Args:
        mask: bool, any shape.

    Returns:
        uint8, shape (ceil(elements / 8),); unused bits are 0.
    """
    return torch.from_numpy(np.packbits(mask.flatten().numpy()))


def unpack(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Undoes `pack`.

    Args:
        packed: uint8, shape (ceil(elements / 8),).
        shape: of the mask.

    Returns:
        bool, in that shape.

    Raises:
        ValueError: there are not as many bytes as the shape needs.
    """
    count = int(np.prod(shape, dtype=np.int64))
    if packed.numel() != (count + 7) // 8:
        raise ValueError(f"{packed.numel()} bytes cannot be a mask of shape {shape}")
    bits = np.unpackbits(packed.numpy(), count=count)
    return torch.from_numpy(bits.view(np.bool_)).view(shape)


def save_masks(masks: Mapping[str, Tensor], path: Path) -> None:
    """Writes masks as safetensors: packed bytes, the shapes in the metadata.

    Args:
        masks: tensor name -> bool tensor.
        path: new file.
    """
    shapes = {name: list(mask.shape) for name, mask in masks.items()}
    packed = {name: pack(mask) for name, mask in masks.items()}
    save_file(packed, path, metadata=metadata(shapes))


def metadata(shapes: Mapping[str, list[int]]) -> dict[str, str]:
    """What stands in the header of a file of masks."""
    return {"format": "pt", SHAPES: json.dumps(dict(shapes), sort_keys=True)}


def load_masks(path: Path) -> dict[str, Tensor]:
    """Reads what `save_masks` or a streamed merge wrote.

    Returns:
        tensor name -> bool tensor.

    Raises:
        DamagedMasks: names the file and every mask that does not fit its shape.
    """
    masks: dict[str, Tensor] = {}
    problems = []
    try:
        with safe_open(path, framework="pt") as file:
            shapes = json.loads((file.metadata() or {}).get(SHAPES, "{}"))
            for name in sorted(file.keys()):
                try:
                    masks[name] = unpack(file.get_tensor(name), tuple(shapes[name]))
                except (KeyError, TypeError, ValueError) as error:
                    problems.append(f"{name}: {error!r}")
    except (OSError, SafetensorError, ValueError) as error:
        raise DamagedMasks(f"{path}: cannot be read as masks ({error}); merge again") from error
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise DamagedMasks(f"{path}: masks do not fit their shapes; merge again:\n{listed}")
    return masks


def decoupled_weight(base: Tensor, shared: Tensor, mask: Tensor, scale: float = 1.0) -> Tensor:
    """An expert's own tensor from what a streamed merge leaves on the disk.

    base + scale * mask * (shared - base) in float64, rounded once; for scale 1 the shared model's
    own bits where the mask is 1.

    Args:
        base: theta_0, floating point, any shape.
        shared: base + tau as stored, same shape and dtype.
        mask: bool, same shape.
        scale: the expert's alpha (MMER) or rescaler (EMR).

    Returns:
        A tensor in the base's dtype and shape.
    """
    if scale == 1.0:
        return torch.where(mask, shared, base)
    start = base.double()
    moved = rounded_once((shared.double() - start).mul_(scale).add_(start), base.dtype)
    return torch.where(mask, moved, base)


def bits_per_parameter(experts: int, weight_bits: int = 16) -> int:
    """What base, merged task vector and masks take: 16 + 16 + N bits in bf16.

    Args:
        experts: N.
        weight_bits: of one stored weight.
    """
    return 2 * weight_bits + experts
