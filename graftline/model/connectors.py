"""Connectors `g_m`: what a frozen encoder says, in the words of the LLM."""

from __future__ import annotations

import torch
from torch import Tensor, nn

LINEAR_RANK = 64
"""Width of the straight path: directions in which the answers' words may differ."""
_FLATTEST = 0.1
"""Smallest spread that a feature is divided by, as a share of the median feature's."""
_SPARE, _ROUNDS = 16, 6
"""Of the subspace iteration: directions beside those asked for, and rounds."""


class MixerConnector(nn.Module):
    """A linear path and a two-layer perceptron, added, over all tokens of one medium.

    All encoder tokens are seen together, so a medium becomes few LLM tokens whatever the
    encoder's own count (as a resampler does), and a stage costs little. Features are standardised
    with the statistics of the rows that the connector was first trained on: what all media have in
    common would otherwise drown what tells them apart. The output has the scale of the LLM's own
    input embeddings, since it stands among them. Always computes in float32.

    Args:
        encoder_tokens: tokens a medium has behind the encoder.
        encoder_width: features a token has.
        tokens: LLM input embeddings a medium becomes.
        hidden: width of the perceptron's hidden layer.
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
        width = encoder_tokens * encoder_width
        self.rank = min(LINEAR_RANK, width, tokens * embedding_width)
        self.mean: Tensor
        self.deviation: Tensor
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))
        self.reduce = nn.Linear(width, self.rank)
        self.expand = nn.Linear(width, hidden)
        self.project = nn.Linear(self.rank + hidden, tokens * embedding_width)
        self.gain = nn.Parameter(torch.full((embedding_width,), float(embedding_scale)))

    def forward(self, features: Tensor) -> Tensor:
        """Maps features (batch, encoder tokens, width) to (batch, tokens, embedding width)."""
        standard = self._standard(features)
        inner = torch.cat([self.reduce(standard), nn.functional.gelu(self.expand(standard))], -1)
        output = self.project(inner).unflatten(1, (self.tokens, self.embedding_width))
        return nn.functional.rms_norm(output, (self.embedding_width,)) * self.gain

    def output_parameters(self) -> list[nn.Parameter]:
        """The last layer and the scale of what it gives."""
        return [*self.project.parameters(), self.gain]

    def _standard(self, features: Tensor) -> Tensor:
        return (features.float().flatten(1) - self.mean) / self.deviation

    def reset(self, features: Tensor, seed: int) -> None:
        """Measures `features` (rows, tokens, width) and draws the weights from `seed` alone."""
        flat = features.float().flatten(1)
        self.mean.copy_(flat.mean(0))
        # A feature that hardly varies tells nothing; dividing by its spread would blow up noise.
        spread = flat.std(0)
        self.deviation.copy_(spread.clamp(min=float(spread.median()) * _FLATTEST + 1e-6))
        generator = torch.Generator().manual_seed(seed)
        for layer in (self.reduce, self.expand, self.project):
            bound = layer.in_features**-0.5
            with torch.no_grad():
                weight = torch.empty(layer.weight.shape, dtype=torch.float32)
                layer.weight.copy_(weight.uniform_(-bound, bound, generator=generator))
                layer.bias.zero_()

    @torch.no_grad()
    def fit(self, features: Tensor, targets: Tensor, centre: Tensor, ridge: float) -> None:
        """Sets the linear path in closed form, so that training starts from words [ours].

        A ridge regression from the features to `targets`, around `centre`; its shrinkage is
        undone, since direction tells words apart and length does not. The perceptron starts from
        zero output.

        Args:
            features: (rows, encoder tokens, width).
            targets: (rows, tokens, embedding width) of mean zero: how what a token is to say
                embeds, beside what it says of other media.
            centre: (embedding width,): what all tokens have in common.
            ridge: penalty as a share of the features' mean square.
        """
        standard, wanted = (
            self._standard(features.to(self.mean.device)).double().cpu(),
            targets.double(),
        )
        gram = standard.T @ standard
        gram += torch.eye(len(gram), dtype=gram.dtype) * ridge * gram.diagonal().mean()
        solution = torch.linalg.solve(gram, standard.T @ wanted.flatten(1))
        found = (standard @ solution).view_as(wanted)
        shrinkage = found.norm(dim=-1).mean(0) / wanted.norm(dim=-1).mean(0).clamp(min=1e-9)
        solution /= shrinkage.clamp(min=1e-3).repeat_interleave(self.embedding_width)
        left, values, right = _leading_directions(solution, self.rank)
        spread = (standard @ left).std(0).clamp(min=1e-6)
        self.reduce.weight.copy_((left / spread).T)
        self.reduce.bias.zero_()
        self.project.weight.zero_()
        self.project.weight[:, : self.rank] = ((values * spread)[:, None] * right).T
        self.project.bias.copy_(centre.repeat(self.tokens))


def _leading_directions(matrix: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values of a matrix and their vectors, by subspace iteration.

    From a seeded start and with some directions to spare (Halko et al., arXiv 0909.4061, algorithm
    4.4): a whole decomposition takes ten times as long for the same leading part.

    Args:
        matrix: (rows, columns).
        count: how many, at most the smaller side.

    Returns:
        Left vectors (rows, count), values (count,), right vectors (count, columns).
    """
    width = min(count + _SPARE, *matrix.shape)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(matrix.shape[1], width, generator=generator, dtype=matrix.dtype)
    basis = torch.linalg.qr(matrix @ drawn)[0]
    for _ in range(_ROUNDS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis)[0])[0]
    left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return (basis @ left)[:, :count], values[:count], right[:count]
