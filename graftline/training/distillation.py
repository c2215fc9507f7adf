"""Losses that compare a model's answers with those of the model before it, token by token."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from graftline.model.multimodal import IGNORED, Batch, MultimodalModel


def answer_logits(model: MultimodalModel, batch: Batch) -> Tensor:
    """Logits of the answers' tokens, those that padding stands in for left out.

    Args:
        model: the model.
        batch: prompts with answers.

    Returns:
        float32 (answer tokens of the batch, vocabulary), in the order of `answer_tokens`.
    """
    logits: Tensor = model.backbone(
        inputs_embeds=model.embed(batch),
        attention_mask=batch.attention_mask,
        position_ids=(batch.attention_mask.cumsum(-1) - 1).clamp(min=0),
        logits_to_keep=batch.labels.shape[1] + 1,
        use_cache=False,
    ).logits[:, :-1]
    return logits[batch.labels != IGNORED].float()


def answer_tokens(batch: Batch) -> Tensor:
    """The true answers' tokens: int64 (answer tokens of the batch,)."""
    return batch.labels[batch.labels != IGNORED]


def distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """`KL(softmax(teacher / T) || softmax(student / T))`, mean over tokens.

    Li & Hoiem (arXiv 1606.09282, eq. 2 to 4) take the cross-entropy of the same distributions: the
    gradient is the same, and this is zero where the two agree. As there, it is not multiplied by
    the square of the temperature.

    Args:
        student: float32 (tokens, vocabulary), logits.
        teacher: as `student`.
        temperature: T.
    """
    return functional.kl_div(
        functional.log_softmax(student / temperature, -1),
        functional.log_softmax(teacher / temperature, -1),
        reduction="batchmean",
        log_target=True,
    )


def dark_experience(
    student: Tensor, teacher: Tensor, tokens: Tensor, alpha: float, beta: float
) -> Tensor:
    """`alpha * mean (student - teacher)^2 + beta * cross-entropy`: DER++ (arXiv 2004.07211, eq. 6).

    The square's mean runs over tokens and vocabulary, as in the authors' code. They draw the rows
    of the two terms apart; here both are of the same rows, which saves a forward pass.

    Args:
        student: float32 (tokens, vocabulary), logits of replayed rows.
        teacher: as `student`.
        tokens: int64 (tokens,), the true answers'.
        alpha: weight of the logits.
        beta: weight of the answers; 0 is DER.
    """
    squares = functional.mse_loss(student, teacher)
    return alpha * squares + beta * functional.cross_entropy(student, tokens)
