"""The multimodal model: a backbone LLM, and a connector for each modality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graftline.errors import GraftlineError
from graftline.model.prompts import EncodedPrompt

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """Prompts side by side, padded on the left so that all answers end together.

    Attributes:
        token_ids: int64 (batch, length).
        attention_mask: int64 (batch, length), 0 on padding.
        modality_ids: int64 (batch, length), 0 on text.
        media: modality -> features (media of that modality in reading order, tokens, width).
        labels: int64 (batch, longest answer), aligned with the last positions; -100 is ignored.
        weight: of its loss, where it is one process's part of a batch (see `graftline.team`).
    """

    token_ids: Tensor
    attention_mask: Tensor
    modality_ids: Tensor
    media: Mapping[str, Tensor]
    labels: Tensor
    weight: float = 1.0

    def to(self, device: torch.device | str) -> Batch:
        """Moves every tensor to `device`."""
        return Batch(
            self.token_ids.to(device),
            self.attention_mask.to(device),
            self.modality_ids.to(device),
            {name: value.to(device) for name, value in self.media.items()},
            self.labels.to(device),
            self.weight,
        )

    @property
    def tokens(self) -> int:
        """Positions that are not padding."""
        return int(self.attention_mask.sum())


def collate(
    prompts: Sequence[EncodedPrompt], media: Sequence[Sequence[Tensor]], pad_id: int
) -> Batch:
    """Makes a batch.

    Args:
        prompts: the encoded prompts.
        media: for each prompt, the features (tokens, width) of its media in slot order.
        pad_id: token id of padding.
    """
    lengths = [len(prompt.token_ids) + len(prompt.answer_ids) for prompt in prompts]
    shape = (len(prompts), max(lengths))
    token_ids = torch.full(shape, pad_id, dtype=torch.long)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    modality_ids = torch.zeros(shape, dtype=torch.long)
    longest = max(len(prompt.answer_ids) for prompt in prompts)
    labels = torch.full((len(prompts), longest), IGNORED, dtype=torch.long)
    gathered: dict[str, list[Tensor]] = {}
    for row, (prompt, own_media, length) in enumerate(zip(prompts, media, lengths, strict=True)):
        start, answer = shape[1] - length, len(prompt.answer_ids)
        end = shape[1] - answer
        token_ids[row, start:] = torch.tensor(prompt.token_ids + prompt.answer_ids)
        attention_mask[row, start:] = 1
        modality_ids[row, start:end] = torch.tensor(prompt.modality_ids)
        if answer:
            labels[row, longest - answer :] = torch.tensor(prompt.answer_ids)
        for modality, features in zip(prompt.slots, own_media, strict=True):
            gathered.setdefault(modality, []).append(features)
    stacked = {name: torch.stack(features) for name, features in gathered.items()}
    return Batch(token_ids, attention_mask, modality_ids, stacked, labels)


class MultimodalModel(nn.Module):
    """Any `transformers` causal LM with media among its input embeddings.

    Args:
        backbone: a causal LM.
        connectors: modality -> module from features to input embeddings.
        modality_numbers: modality -> its number in `Batch.modality_ids`.
    """

    def __init__(
        self,
        backbone: Any,
        connectors: Mapping[str, nn.Module],
        modality_numbers: Mapping[str, int],
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.connectors = nn.ModuleDict(dict(connectors))
        self.modality_numbers = dict(modality_numbers)
        # A linear layer on a strided bf16 slice takes a path some 80 times slower on CPU.
        backbone.get_output_embeddings().register_forward_pre_hook(_make_contiguous)

    @property
    def device(self) -> torch.device:
        """Where the backbone lies."""
        return torch.device(next(self.backbone.parameters()).device)

    def embed(self, batch: Batch) -> Tensor:
        """Input embeddings (batch, length, width) with the media at their places."""
        embeddings: Tensor = self.backbone.get_input_embeddings()(batch.token_ids)
        for modality, features in batch.media.items():
            if modality not in self.connectors:
                raise GraftlineError(f"This model has no connector for {modality}.")
            vectors = self.connectors[modality](features)
            places = batch.modality_ids == self.modality_numbers[modality]
            embeddings = embeddings.masked_scatter(
                places.unsqueeze(-1), vectors.to(embeddings.dtype)
            )
        return embeddings

    def forward(self, batch: Batch) -> Tensor:
        """Mean cross-entropy (float32 scalar) over the answers' tokens."""
        answer = batch.labels.shape[1]
        logits = self.backbone(
            inputs_embeds=self.embed(batch),
            attention_mask=batch.attention_mask,
            position_ids=_positions(batch.attention_mask),
            logits_to_keep=answer + 1,
            use_cache=False,
        ).logits[:, :-1]
        return nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), batch.labels.flatten(), ignore_index=IGNORED
        )

    @torch.inference_mode()
    def generate(self, batch: Batch, max_new_tokens: int, pad_id: int, end_id: int) -> Tensor:
        """Greedy continuation with a KV cache: int64 (batch, at most `max_new_tokens`)."""
        output: Tensor = self.backbone.generate(
            inputs_embeds=self.embed(batch),
            attention_mask=batch.attention_mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=pad_id,
            eos_token_id=end_id,
        )
        return output


def _positions(attention_mask: Tensor) -> Tensor:
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def _make_contiguous(_module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return (arguments[0].contiguous(), *arguments[1:])
