"""Elastic weight consolidation, online: weights that matter to old stages are held where they were.

Kirkpatrick et al. 2017 (arXiv 1612.00796), in the online form of Schwarz et al. 2018 (arXiv
1805.06370): one running Fisher and one anchor, the model before, however many stages there were.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from graftline.errors import GraftlineError
from graftline.model.loading import LoadedModel
from graftline.model.multimodal import Batch, MultimodalModel
from graftline.training.optimizer import PIECE
from graftline.training.phases import backbone_group

FISHER = "fisher.safetensors"


def weighed_parameters(loaded: LoadedModel, train_embeddings: bool) -> dict[str, nn.Parameter]:
    """What fine-tuning trains of a backbone, by name."""
    trained = backbone_group(loaded, 0.0, "full", train_embeddings).parameters
    chosen = {id(parameter) for parameter in trained}
    named = loaded.model.backbone.named_parameters()
    return {name: parameter for name, parameter in named if id(parameter) in chosen}


def fisher_diagonal(
    model: MultimodalModel, parameters: Sequence[nn.Parameter], batches: Iterable[Batch]
) -> list[Tensor]:
    """The diagonal of the empirical Fisher information, by squared gradients of batches.

    Of the mean log-likelihood of the true answers' tokens. A batch of B rows gives B times its
    squared gradient: where gradients average to zero, as at the end of training, that is what its
    rows' own squares would give, for one backward pass. With B = 1 it is exact.

    Args:
        model: the model at the end of a stage.
        parameters: whose information is wanted.
        batches: of the stage's training rows.

    Returns:
        For each parameter float32 of its shape, scaled so that the mean over all elements of all
        parameters is 1 (Schwarz et al. normalise each task's Fisher too): a stage's weight does
        not hang on how steep its loss is.

    Raises:
        GraftlineError: all gradients are zero, or one is not finite.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    for parameter in parameters:
        parameter.requires_grad_(True)
    sums = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
    for batch in batches:
        model(batch.to(model.device)).backward()
        for total, parameter in zip(sums, parameters, strict=True):
            if parameter.grad is not None:
                gradient = parameter.grad.float()
                total.addcmul_(gradient, gradient, value=float(len(batch.token_ids)))
            parameter.grad = None
    elements = sum(total.numel() for total in sums)
    mean = sum(float(total.sum(dtype=torch.float64)) for total in sums) / elements
    if not 0.0 < mean < float("inf"):
        raise GraftlineError(
            f"The Fisher information has a mean of {mean} before it is scaled; lower "
            "fine_tune.learning_rate, or set precision: float32."
        )
    return [total.div_(mean) for total in sums]


def save_fisher(
    out: Path, fisher: dict[str, Tensor], previous: Path | None, decay: float, rows: int
) -> None:
    """Writes the running Fisher: `decay` times the previous one plus this stage's.

    Args:
        out: folder that gets `fisher.safetensors` (float32, by parameter name) and `fisher.json`.
        fisher: this stage's; added to in place.
        previous: folder of the stage before's.
        decay: gamma of Schwarz et al., eq. 9.
        rows: how many rows this stage's was read from.
    """
    stages = [rows]
    if previous is not None:
        old = load_file(previous / FISHER)
        for name, value in fisher.items():
            value.add_(old.pop(name).to(value.device), alpha=decay)
        stages = [*json.loads((previous / "fisher.json").read_text("utf-8"))["rows"], rows]
    tensors = {name: value.cpu().contiguous() for name, value in fisher.items()}
    save_file(tensors, out / FISHER)
    record = {"rows": stages, "decay": decay, "mean_of_a_stage": 1.0}
    (out / "fisher.json").write_text(json.dumps(record, indent=2), encoding="utf-8")


class ElasticPenalty:
    """`strength / 2 * sum_k F_k (theta_k - theta*_k)^2`, theta* being the weights as they are now.

    Value and gradient come from one pass over the weights, in pieces that stay in the cache: beside
    an optimiser step, which reads and writes three such passes, it costs little.

    Args:
        parameters: the backbone's trained weights, by name.
        fisher: F of each, by the same names.
        strength: lambda.

    Raises:
        GraftlineError: the names or shapes differ.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], fisher: Mapping[str, Tensor], strength: float
    ) -> None:
        wrong = [
            name
            for name in sorted({*parameters, *fisher})
            if name not in parameters
            or name not in fisher
            or parameters[name].shape != fisher[name].shape
        ]
        if wrong:
            raise GraftlineError(
                f"The Fisher information does not fit the backbone at {wrong[0]} ({len(wrong)} "
                "such); it is of another model."
            )
        self.parameters = list(parameters.values())
        self.anchors = [parameter.detach().clone() for parameter in self.parameters]
        self.weights = [fisher[name].to(p.device) * strength for name, p in parameters.items()]

    def __call__(self) -> Tensor:
        """The penalty, float32 scalar."""
        value: Tensor = _Elastic.apply(self, *self.parameters)  # type: ignore[no-untyped-call]
        return value


class _Elastic(torch.autograd.Function):
    """The penalty with its gradient `strength * F * (theta - theta*)` in closed form."""

    @staticmethod
    def forward(ctx: Any, penalty: ElasticPenalty, *parameters: Tensor) -> Tensor:
        value = torch.zeros((), dtype=torch.float32, device=parameters[0].device)
        ctx.gradients = []
        for parameter, anchor, weights in zip(
            parameters, penalty.anchors, penalty.weights, strict=True
        ):
            gradient = torch.empty_like(parameter)
            flats = [each.view(-1) for each in (parameter, anchor, weights, gradient)]
            for start in range(0, parameter.numel(), PIECE):
                now, before, weight, target = (flat[start : start + PIECE] for flat in flats)
                drift = now.to(torch.float32, copy=True).sub_(before)
                pull = weight * drift
                value += torch.dot(pull, drift)
                target.copy_(pull)
            ctx.gradients.append(gradient)
        return value / 2

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        [scale] = upstream
        if float(scale) != 1.0:
            for gradient in ctx.gradients:
                gradient.mul_(scale)
        return None, *ctx.gradients
