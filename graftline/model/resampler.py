"""A connector that asks: learned queries read an encoder's tokens by cross-attention.

For encoders with hundreds of tokens, of which a perceptron over all would have hundreds of millions
of weights. After the Perceiver resampler (Alayrac et al., Flamingo, 2022, arXiv 2204.14198) and the
Q-Former (Li et al., BLIP-2, 2023, arXiv 2301.12597), without their text branch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_FLATTEST = 0.1
"""Smallest spread that a feature is divided by, as a share of the median feature's."""


class ResamplerBlock(nn.Module):
    """Queries attend to the tokens, then a perceptron; both with a skip path."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.before_attention = nn.LayerNorm(hidden)
        self.attention = nn.MultiheadAttention(hidden, heads, batch_first=True)
        self.before_perceptron = nn.LayerNorm(hidden)
        self.widen = nn.Linear(hidden, 4 * hidden)
        self.narrow = nn.Linear(4 * hidden, hidden)

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """Maps queries (batch, queries, hidden) by tokens (batch, tokens, hidden) to new ones."""
        asked = self.before_attention(queries)
        queries = queries + self.attention(asked, tokens, tokens, need_weights=False)[0]
        inner = nn.functional.gelu(self.widen(self.before_perceptron(queries)))
        result: Tensor = queries + self.narrow(inner)
        return result


class ResamplerConnector(nn.Module):
    """Learned queries that become a medium's LLM input embeddings. Always computes in float32.

    Features are standardised, and the output has the scale of the LLM's own input embeddings, as in
    `MixerConnector`, whose place it can take.

    Args:
        encoder_tokens: tokens a medium has behind the encoder.
        encoder_width: features a token has.
        tokens: queries; LLM input embeddings a medium becomes.
        hidden: width inside, a multiple of `heads`.
        layers: blocks of cross-attention and perceptron.
        heads: of the attention.
        embedding_width: width of the LLM's input embeddings.
        embedding_scale: root mean square of the LLM's input embeddings.
    """

    def __init__(
        self,
        encoder_tokens: int,
        encoder_width: int,
        tokens: int,
        hidden: int,
        layers: int,
        heads: int,
        embedding_width: int,
        embedding_scale: float,
    ) -> None:
        super().__init__()
        self.tokens, self.embedding_width = tokens, embedding_width
        self.mean: Tensor
        self.deviation: Tensor
        self.register_buffer("mean", torch.zeros(encoder_width))
        self.register_buffer("deviation", torch.ones(encoder_width))
        self.enter = nn.Linear(encoder_width, hidden)
        self.places = nn.Parameter(torch.zeros(encoder_tokens, hidden))
        self.queries = nn.Parameter(torch.zeros(tokens, hidden))
        self.blocks = nn.ModuleList(ResamplerBlock(hidden, heads) for _ in range(layers))
        self.leave = nn.LayerNorm(hidden)
        self.project = nn.Linear(hidden, embedding_width)
        self.gain = nn.Parameter(torch.full((embedding_width,), float(embedding_scale)))

    def forward(self, features: Tensor) -> Tensor:
        """Maps features (batch, encoder tokens, width) to (batch, tokens, embedding width)."""
        standard = (features.float() - self.mean) / self.deviation
        tokens = self.enter(standard) + self.places
        queries = self.queries.expand(len(features), -1, -1)
        for block in self.blocks:
            queries = block(queries, tokens)
        output = self.project(self.leave(queries))
        return nn.functional.rms_norm(output, (self.embedding_width,)) * self.gain

    def output_parameters(self) -> list[nn.Parameter]:
        """The last layer and the scale of what it gives."""
        return [*self.project.parameters(), self.gain]

    @torch.no_grad()
    def reset(self, features: Tensor, seed: int) -> None:
        """Measures `features` (rows, tokens, width) and draws the weights from `seed` alone."""
        flat = features.float().flatten(0, 1)
        self.mean.copy_(flat.mean(0))
        spread = flat.std(0)
        self.deviation.copy_(spread.clamp(min=float(spread.median()) * _FLATTEST + 1e-6))
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            owner = self.get_submodule(name.rpartition(".")[0])
            if parameter is self.gain or isinstance(owner, nn.LayerNorm):
                continue  # as they were made: the embeddings' scale, and the identity
            if parameter.ndim == 1:
                parameter.zero_()
                continue
            drawn = torch.empty(parameter.shape, dtype=torch.float32)
            if parameter is self.queries or parameter is self.places:
                parameter.copy_(drawn.normal_(0.0, 0.5, generator=generator))
            else:
                bound = parameter.shape[1] ** -0.5
                parameter.copy_(drawn.uniform_(-bound, bound, generator=generator))
