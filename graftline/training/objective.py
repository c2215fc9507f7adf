"""A model whose loss is not its own: what a phase makes small is given to it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from graftline.model.multimodal import Batch, MultimodalModel

Objective = Callable[[MultimodalModel, Batch], Tensor]
"""What is made small: a model and a batch to a float32 scalar."""


class ObjectiveModel(MultimodalModel):
    """The same backbone and connectors; its loss is an objective's."""

    def __init__(self, model: MultimodalModel, objective: Objective) -> None:
        super().__init__(model.backbone, dict(model.connectors.items()), model.modality_numbers)
        self._plain, self._objective = [model], objective  # a list hides it: no second child

    def forward(self, batch: Batch) -> Tensor:
        """The objective, float32 scalar."""
        return self._objective(self._plain[0], batch)
