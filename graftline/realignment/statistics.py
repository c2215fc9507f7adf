"""What is recorded of a modality when its connector has been trained, instead of its rows [ours].

The connector's last layer reads a vector of some hundred numbers a medium, its *inner* vector.
Realigning trains that layer alone, so the layers before it give the same inner vectors for ever,
and their statistics are all that later stages need to know of a modality's media: centres of
clusters, how many rows are near each, and one covariance around the centres. With them go the
distinct questions, and no row, feature or answer. Prototypes with noise around them stand in for
old rows in class-incremental learning, too (PASS, Zhu et al., CVPR 2021).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy.cluster.vq import kmeans2
from torch import Tensor, nn

from graftline.errors import GraftlineError
from graftline.model.connectors import MixerConnector

_ROUNDS = 20


class LastLayer(nn.Module):
    """A connector's last layer alone: from inner vectors to input embeddings.

    Args:
        connector: whose layer; its parameters are shared, not copied.
    """

    def __init__(self, connector: MixerConnector) -> None:
        super().__init__()
        self.connector = connector
        self.tokens = connector.tokens

    def forward(self, inner: Tensor) -> Tensor:
        """Maps inner vectors (batch, width) to (batch, tokens, embedding width)."""
        width = self.connector.embedding_width
        output = self.connector.project(inner).unflatten(1, (self.tokens, width))
        return nn.functional.rms_norm(output, (width,)) * self.connector.gain


@torch.no_grad()
def inner_vectors(connector: MixerConnector, features: Tensor) -> Tensor:
    """What the last layer of a connector reads of features (rows, tokens, width).

    Returns:
        float32 (rows, inner width).
    """
    seen: list[Tensor] = []

    def note(_module: nn.Module, given: tuple[Tensor, ...]) -> None:
        seen.append(given[0])

    hook = connector.project.register_forward_pre_hook(note)
    try:
        connector(features.to(connector.mean.device))
    finally:
        hook.remove()
    return seen[0].cpu()


@dataclass(frozen=True)
class TokenStatistics:
    """What is known of a modality's media.

    Attributes:
        centres: float32 (clusters, width), means of inner vectors that are near each other.
        counts: int64 (clusters,), rows near each centre.
        covariance: float32 (width, width), of rows around their centres, all clusters together.
        questions: the distinct questions.
        question_counts: how many rows ask each.
    """

    centres: Tensor
    counts: Tensor
    covariance: Tensor
    questions: tuple[str, ...]
    question_counts: tuple[int, ...]

    def sample(self, count: int, seed: int) -> tuple[Tensor, list[str]]:
        """Draws inner vectors and a question for each; the same for the same seed.

        Args:
            count: how many.
            seed: of the generator.

        Returns:
            float32 (count, width), and the questions.
        """
        generator = np.random.Generator(np.random.PCG64([seed, count]))
        counts = self.counts.numpy().astype(np.float64)
        chosen = generator.choice(len(counts), count, p=counts / counts.sum())
        values, vectors = torch.linalg.eigh(self.covariance.double())
        root = vectors * values.clamp(min=0.0).sqrt()
        noise = torch.from_numpy(generator.standard_normal((count, len(values))))
        drawn = self.centres[torch.from_numpy(chosen)].double() + noise @ root.T
        asked = np.array(self.question_counts, np.float64)
        numbers = generator.choice(len(asked), count, p=asked / asked.sum())
        return drawn.float(), [self.questions[number] for number in numbers]


def statistics_of(
    inner: Tensor, questions: Sequence[str], clusters: int, seed: int
) -> TokenStatistics:
    """Records inner vectors by seeded k-means (Lloyd, from k-means++).

    Args:
        inner: float32 (rows, width).
        questions: of each row.
        clusters: how many centres, at most one a row.
        seed: of the first centres.

    Raises:
        GraftlineError: there are no rows, or one is not finite.
    """
    if not len(inner) or not bool(inner.isfinite().all()):
        raise GraftlineError("There is nothing to record: no rows, or features that are not finite")
    values = inner.double().numpy()
    generator = np.random.Generator(np.random.PCG64(seed))
    count = min(clusters, len(values))
    labels = kmeans2(values, count, iter=_ROUNDS, minit="++", missing="warn", seed=generator)[1]
    sizes = np.bincount(labels, minlength=count)
    used = np.flatnonzero(sizes)
    # Means once more: the last round's centres are of the labels before it.
    means = np.stack([values[labels == label].mean(0) for label in range(count) if sizes[label]])
    around = values - means[np.searchsorted(used, labels)]
    asked = Counter(questions)
    return TokenStatistics(
        torch.from_numpy(means).float(),
        torch.from_numpy(sizes[used].astype(np.int64)),
        torch.from_numpy(around.T @ around / len(values)).float(),
        tuple(sorted(asked)),
        tuple(asked[question] for question in sorted(asked)),
    )


def save_statistics(folder: Path, statistics: TokenStatistics) -> None:
    """Writes `statistics.safetensors` and `questions.json`."""
    tensors = {
        "centres": statistics.centres.contiguous(),
        "counts": statistics.counts.contiguous(),
        "covariance": statistics.covariance.contiguous(),
    }
    save_file(tensors, folder / "statistics.safetensors")
    asked = dict(zip(statistics.questions, statistics.question_counts, strict=True))
    (folder / "questions.json").write_text(json.dumps(asked, indent=2), encoding="utf-8")


def read_statistics(folder: Path) -> TokenStatistics:
    """Reads what `save_statistics` wrote."""
    tensors = load_file(folder / "statistics.safetensors")
    asked = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    return TokenStatistics(
        tensors["centres"], tensors["counts"], tensors["covariance"],
        tuple(asked), tuple(asked.values()),
    )  # fmt: skip
