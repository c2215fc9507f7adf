"""A multimodal model whose media meet their own weights."""

from __future__ import annotations

from torch import Tensor

from graftline.model.multimodal import Batch, MultimodalModel
from graftline.model.routing.router import routed


class RoutedModel(MultimodalModel):
    """A multimodal model around a routed backbone; each batch says what its tokens are."""

    @classmethod
    def around(cls, model: MultimodalModel) -> RoutedModel:
        """The same backbone and connectors."""
        return cls(model.backbone, dict(model.connectors.items()), model.modality_numbers)

    def forward(self, batch: Batch) -> Tensor:
        """Mean cross-entropy (float32 scalar) over the answers' tokens."""
        with routed(self.backbone, batch.modality_ids):
            return super().forward(batch)

    def generate(self, batch: Batch, max_new_tokens: int, pad_id: int, end_id: int) -> Tensor:
        """Greedy continuation with a KV cache: int64 (batch, at most `max_new_tokens`)."""
        with routed(self.backbone, batch.modality_ids):
            return super().generate(batch, max_new_tokens, pad_id, end_id)
