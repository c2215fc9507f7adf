"""O-LoRA: each stage learns in directions orthogonal to those of the stages before it.

Wang et al. 2023 (arXiv 2310.14152). A LoRA changes a layer by B A; the rows of A span the inputs
that it reacts to. A new A orthogonal to the old ones leaves alone what old stages react to.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from graftline.errors import GraftlineError

SUBSPACE = "subspace.safetensors"
_BEFORE, _AFTER = "base_model.model.", ".lora_A."


def input_directions(backbone: nn.Module) -> dict[str, nn.Parameter]:
    """A of every layer with a LoRA, (rank, inputs), by the layer's name."""
    return {
        name.removeprefix(_BEFORE).partition(_AFTER)[0]: parameter
        for name, parameter in backbone.named_parameters()
        if _AFTER in name
    }


def save_subspace(out: Path, directions: Mapping[str, Tensor], rank: int) -> None:
    """Writes a stage's A into its artifact, as float32, with a record."""
    tensors = {
        name: value.detach().float().cpu().contiguous() for name, value in directions.items()
    }
    save_file(tensors, out / SUBSPACE)
    record = {"rank": rank, "layers": len(tensors)}
    (out / "subspace.json").write_text(json.dumps(record, indent=2), encoding="utf-8")


class Orthogonality:
    """`strength * sum over layers and earlier stages j of the squared entries of A A_j^T`.

    The paper's eq. 8; the authors' code sums absolute values instead.

    Args:
        directions: layer -> this stage's A, which learns.
        earlier: folders of the earlier stages' artifacts.
        strength: lambda_1.

    Raises:
        GraftlineError: an earlier stage lacks a layer, or has one of another width.
    """

    def __init__(
        self, directions: Mapping[str, Tensor], earlier: Sequence[Path], strength: float
    ) -> None:
        self.strength = strength
        stages = [(folder, load_file(folder / SUBSPACE)) for folder in earlier]
        self.pairs: list[tuple[Tensor, Tensor]] = []
        for name, own in directions.items():
            for folder, kept in stages:
                if name not in kept or kept[name].shape[1] != own.shape[1]:
                    raise GraftlineError(f"{folder / SUBSPACE} does not fit the layer {name}.")
            if stages:
                old = torch.cat([kept[name] for _, kept in stages])
                self.pairs.append((own, old.to(own.device)))

    def __call__(self) -> Tensor:
        """The penalty, float32 scalar."""
        products = [(own.float() @ old.t()).square().sum() for own, old in self.pairs]
        return self.strength * torch.stack(products).sum()
