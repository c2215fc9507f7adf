"""A connector corrected in closed form after a merge: no rows, no gradients [ours].

What a backbone's first layers make of a token begins with linear maps of it. Stacked, with the
norms' weights folded in, they are a matrix R of as many rows as the layers have queries, keys,
values and gates. Before the merge it is `R_old`, behind it `R_new`. The correction is the map A of
the token space that minimises

    E |R_new A t - R_old t|^2 + ridge * m * E |A t - t|^2,    m = trace(R_new' R_new) / width:

the merged layers are to read of the corrected token what the old ones read of the old one, and the
token itself, which later layers see too, is to stay. The minimum is

    A = (R_new' R_new + ridge m I)^-1 (R_new' R_old + ridge m I)

whatever the tokens are, so that it needs the two backbones' weights and nothing else. A connector
ends in a norm and a gain, so A goes into its last linear layer, `G^-1 A G` for the gain G; tokens
then keep their directions `A t`, and the gain is scaled so that they keep their mean length, too.
That one number is measured on features drawn from the mean and deviation that every connector
holds.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from graftline.errors import GraftlineError
from graftline.merging.backbones import WEIGHTS
from graftline.model.connectors import MixerConnector

_READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
"""Of a Llama-like decoder layer: norm -> the linear layers that read behind it."""
_DRAWN = 256


def first_readings(folder: Path, layers: int) -> Tensor:
    """R: what the first layers of a backbone read of a token.

    Args:
        folder: `transformers` folder of a Llama-like decoder.
        layers: how many layers, at most as many as there are.

    Returns:
        float64 (rows, width).

    Raises:
        GraftlineError: a weight is missing; names it.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    blocks = []
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        names = set(file.keys())
        for layer in range(min(layers, int(config["num_hidden_layers"]))):
            for norm, readers in _READERS.items():
                for reader in (norm, *readers):
                    if f"model.layers.{layer}.{reader}.weight" not in names:
                        raise GraftlineError(
                            f"{folder / WEIGHTS}: model.layers.{layer}.{reader}.weight is missing; "
                            "the correction knows Llama-like decoders. Use --method mera-distilled."
                        )
                gain = file.get_tensor(f"model.layers.{layer}.{norm}.weight").double()
                for reader in readers:
                    weight = file.get_tensor(f"model.layers.{layer}.{reader}.weight").double()
                    blocks.append(weight * gain)
    return torch.cat(blocks)


def correcting_map(old: Tensor, new: Tensor, ridge: float) -> Tensor:
    """A, by the formula above.

    Args:
        old: R_old, float64 (rows, width).
        new: R_new, of the same shape.
        ridge: pull towards the identity, as a share of R_new's mean square; 0 for none, which
            needs rows that span the token space.

    Returns:
        float64 (width, width).
    """
    gram = new.T @ new
    pull = torch.eye(len(gram), dtype=gram.dtype) * (ridge * gram.diagonal().mean())
    solved: Tensor = torch.linalg.solve(gram + pull, new.T @ old + pull)
    return solved


@torch.no_grad()
def fold_into(connector: MixerConnector, correction: Tensor, seed: int) -> None:
    """Makes a connector say `A t` where it said t, up to the length of each token.

    Args:
        connector: changed in place.
        correction: A, float64 (embedding width, embedding width).
        seed: of the features that the mean length is measured on.

    Raises:
        GraftlineError: the connector's gain is zero somewhere, so that nothing can go behind it.
    """
    gain = connector.gain.double()
    if bool((gain.abs() < 1e-9).any()):
        raise GraftlineError("A connector's gain is zero; align it again before correcting it.")
    drawn = drawn_features(connector, _DRAWN, seed)
    before = connector(drawn).double() @ correction.T
    inside = correction * gain / gain[:, None]  # G^-1 A G
    project: nn.Linear = connector.project
    weight = project.weight.double().view(connector.tokens, len(gain), -1)
    project.weight.copy_((inside @ weight).flatten(0, 1))
    project.bias.copy_((project.bias.double().view(connector.tokens, -1) @ inside.T).flatten())
    after = connector(drawn).double()
    # The norm sets each token's length; what is left to choose is their common scale.
    connector.gain.mul_(float((before * after).sum() / after.square().sum()))


def drawn_features(connector: MixerConnector, count: int, seed: int) -> Tensor:
    """Features from the mean and deviation that a connector holds: (count, 1, all features)."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 1, len(connector.mean), generator=generator)
    return connector.mean.cpu() + noise * connector.deviation.cpu()
