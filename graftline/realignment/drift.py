"""Which connectors a merge has left out of step, said without training anything [ours].

Two measures, on what was recorded of a modality (`graftline.realignment.statistics`):

- **readings**: how much what the first layers read of its tokens has moved, as a share of what
  they read before, `E |(R_new - R_old) t|^2 / E |R_old t|^2` with R of
  `graftline.realignment.correction`. It takes the second moment of the tokens and no model.
- **answers**: `KL(old || new)` of the answers to drawn media, by the old model's own answers. It
  takes one pass of both models, and is where distilling begins.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from scipy.stats import rankdata
from torch import Tensor

from graftline.data.examples import TrainingSet
from graftline.model.loading import LoadedModel
from graftline.realignment.distilling import InnerExamples, last_layer, old_answers
from graftline.realignment.statistics import TokenStatistics
from graftline.training.distillation import answer_logits, distillation


@torch.no_grad()
def second_moment(loaded: LoadedModel, modality: str, inner: Tensor) -> Tensor:
    """E t t' of the tokens that a connector makes of inner vectors: float64 (width, width)."""
    layer = last_layer(loaded, modality)
    tokens: Tensor = layer(inner.to(loaded.model.device)).flatten(0, 1).double().cpu()
    moment: Tensor = tokens.T @ tokens / len(tokens)
    return moment


def reading_drift(old: Tensor, new: Tensor, moment: Tensor) -> float:
    """How far readings have moved, as a share of what they were.

    Args:
        old: R_old, float64 (rows, width).
        new: R_new, of the same shape.
        moment: E t t', float64 (width, width).
    """
    moved, before = new - old, old
    return float(((moved @ moment) * moved).sum() / ((before @ moment) * before).sum())


@torch.no_grad()
def answer_drift(
    old: LoadedModel,
    new: LoadedModel,
    modality: str,
    statistics: TokenStatistics,
    *,
    samples: int,
    max_new_tokens: int,
    seed: int,
) -> float:
    """KL(old || new) per token of the old model's answers to drawn media, in nats.

    Args:
        old: the model before the merge, its connector's last layer alone
            (`graftline.realignment.distilling.with_last_layer`).
        new: the merged backbone beside the same connector, likewise.
        modality: whose connector.
        statistics: of the modality.
        samples: how many media are drawn.
        max_new_tokens: the longest answer.
        seed: of what is drawn.
    """
    inner, questions = statistics.sample(samples, seed)
    answers = old_answers(f"{modality}: drift", old, modality, inner, questions, max_new_tokens)
    examples = InnerExamples(modality, inner, questions, answers, new.prompts)
    rows = TrainingSet([examples], 32, seed)
    total, tokens = 0.0, 0
    for step in range(-(-samples // 32)):
        batch = rows.batch(step).to(new.model.device)
        told = answer_logits(old.model, batch)
        found = distillation(answer_logits(new.model, batch), told, 1.0)
        total += float(found) * len(told)
        tokens += len(told)
    return total / tokens


def rank_correlation(predicted: Sequence[float], measured: Sequence[float]) -> float | None:
    """Spearman's rank correlation; None for fewer than three, or where one side does not vary."""
    if len(predicted) < 3 or len(set(predicted)) == 1 or len(set(measured)) == 1:
        return None
    first, second = (torch.from_numpy(rankdata(each)) for each in (predicted, measured))
    return float(torch.corrcoef(torch.stack([first, second]))[0, 1])
