"""Connectors `g_m`: what a frozen encoder says, in the words of the LLM."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MixerConnector(nn.Module):
    """A two-layer perceptron over all tokens of one medium.

    All encoder tokens are seen together, so a medium becomes few LLM tokens whatever the
    encoder's own count (as a resampler does), and a stage costs little. Features are standardised
    with the statistics of the rows that the connector was first trained on: what all media have in
    common would otherwise drown what tells them apart. The output has the scale of the LLM's own
    input embeddings, since it stands among them. Always computes in float32.

    Args:
        encoder_tokens: tokens a medium has behind the encoder.
        encoder_width: features a token has.
        tokens: LLM input embeddings a medium becomes.
        hidden: width of the hidden layer.
        embedding_width: width of the LLM's input embeddings.
        embedding_scale: root mean square of the LLM's input embeddings.
    """

    def __init__(
        self,
        encoder_tokens: int,
        encoder_width: int,
        tokens: int,
        hidden: int,
        embedding_width: int,
        embedding_scale: float,
    ) -> None:
        super().__init__()
        self.tokens, self.embedding_width = tokens, embedding_width
        self.mean: Tensor
        self.deviation: Tensor
        self.register_buffer("mean", torch.zeros(encoder_tokens * encoder_width))
        self.register_buffer("deviation", torch.ones(encoder_tokens * encoder_width))
        self.expand = nn.Linear(encoder_tokens * encoder_width, hidden)
        self.project = nn.Linear(hidden, tokens * embedding_width)
        self.gain = nn.Parameter(torch.full((embedding_width,), float(embedding_scale)))

    def forward(self, features: Tensor) -> Tensor:
        """Maps features (batch, encoder tokens, width) to (batch, tokens, embedding width)."""
        standard = (features.float().flatten(1) - self.mean) / self.deviation
        hidden = nn.functional.gelu(self.expand(standard))
        output = self.project(hidden).unflatten(1, (self.tokens, self.embedding_width))
        return nn.functional.rms_norm(output, (self.embedding_width,)) * self.gain

    def reset(self, features: Tensor, seed: int) -> None:
        """Measures `features` (rows, tokens, width) and draws the weights from `seed` alone."""
        flat = features.float().flatten(1)
        self.mean.copy_(flat.mean(0))
        # A feature that hardly varies tells nothing; dividing by its spread would blow up noise.
        spread = flat.std(0)
        self.deviation.copy_(spread.clamp(min=float(spread.median()) * 0.1 + 1e-6))
        generator = torch.Generator().manual_seed(seed)
        for layer in (self.expand, self.project):
            bound = layer.in_features**-0.5
            with torch.no_grad():
                weight = torch.empty(layer.weight.shape, dtype=torch.float32)
                layer.weight.copy_(weight.uniform_(-bound, bound, generator=generator))
                layer.bias.zero_()

    def fit(self, features: Tensor, targets: Tensor, ridge: float) -> None:
        """Sets the last layer in closed form, so that training starts from words [ours].

        A ridge regression from the hidden layer's random features (Rahimi & Recht, 2007) to
        `targets`, the same for each of the medium's tokens; what all targets have in common is
        left out, since it says nothing about the medium.

        Args:
            features: (rows, encoder tokens, width).
            targets: (rows, embedding width), for example what the answers' words embed to.
            ridge: penalty as a share of the hidden features' mean square.
        """
        with torch.no_grad():
            standard = (features.float().flatten(1) - self.mean) / self.deviation
            hidden = nn.functional.gelu(self.expand(standard)).double()
            centre, wanted = hidden.mean(0), targets.double() - targets.double().mean(0)
            hidden = hidden - centre
            gram = hidden.T @ hidden
            gram += torch.eye(len(gram), dtype=gram.dtype) * ridge * gram.diagonal().mean()
            solution = torch.linalg.solve(gram, hidden.T @ wanted)
            self.project.weight.copy_(solution.T.repeat(self.tokens, 1))
            self.project.bias.copy_(-(centre @ solution).repeat(self.tokens))
