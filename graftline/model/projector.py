"""The connector of LLaVA-style models: every encoder token becomes an LLM token, each alone.

One matrix, or two with an activation between them, over one token or over a group of neighbours
(Liu et al., LLaVA, 2023, arXiv 2304.08485). Names of weights are those of `transformers`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from graftline.model.building import BUILDING


class ProjectorConnector(nn.Module):
    """Maps an encoder's tokens one by one, or group by group. Always computes in float32.

    It comes with a model that was taken apart and is never drawn anew; `MixerConnector`'s place is
    its own otherwise.

    Args:
        encoder_tokens: tokens a medium has behind the encoder.
        encoder_width: features a token has.
        group: neighbouring encoder tokens that become one LLM token.
        hidden: width between the two layers; 0 for one layer.
        activation: between them, by `transformers`' name; empty for one layer.
        biased: whether layers add a bias.
        embedding_width: width of the LLM's input embeddings.
    """

    def __init__(
        self,
        encoder_tokens: int,
        encoder_width: int,
        group: int,
        hidden: int,
        activation: str,
        biased: bool,
        embedding_width: int,
    ) -> None:
        super().__init__()
        self.tokens, self.embedding_width = encoder_tokens // group, embedding_width
        self.group = group
        width = encoder_width * group
        self._activation: Any = None
        if hidden:
            with BUILDING:
                from transformers.activations import ACT2FN

            self._activation = ACT2FN[activation]
            self.linear_1 = nn.Linear(width, hidden, bias=biased)
            self.linear_2 = nn.Linear(hidden, embedding_width, bias=biased)
        else:
            self.linear = nn.Linear(width, embedding_width, bias=biased)

    def forward(self, features: Tensor) -> Tensor:
        """Maps features (batch, encoder tokens, width) to (batch, tokens, embedding width)."""
        grouped = features.float().reshape(len(features), self.tokens, -1)
        if self._activation is None:
            found: Tensor = self.linear(grouped)
        else:
            found = self.linear_2(self._activation(self.linear_1(grouped)))
        return found

    def output_parameters(self) -> list[nn.Parameter]:
        """The last layer."""
        last = self.linear if self._activation is None else self.linear_2
        return list(last.parameters())

    def reset(self, features: Tensor, seed: int) -> None:
        """Not offered: such a connector is taken from a finished model.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("a projector comes with the model that it was taken from")


def projector_shape(
    weights: dict[str, Tensor], encoder_tokens: int, group: int, activation: str | None
) -> dict[str, Any]:
    """Arguments of `ProjectorConnector` for weights by `transformers`' names.

    Args:
        weights: `linear.*`, or `linear_1.*` and `linear_2.*`.
        encoder_tokens: tokens a medium has behind the encoder.
        group: neighbouring tokens that become one.
        activation: None for one layer.
    """
    first = weights["linear.weight" if activation is None else "linear_1.weight"]
    last = weights["linear.weight" if activation is None else "linear_2.weight"]
    return {
        "encoder_tokens": encoder_tokens,
        "encoder_width": first.shape[1] // group,
        "group": group,
        "hidden": 0 if activation is None else first.shape[0],
        "activation": activation or "",
        "biased": any(name.endswith(".bias") for name in weights),
        "embedding_width": last.shape[0],
    }
