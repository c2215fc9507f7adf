"""How attention is computed where no kernel of the device does it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graftline.model.building import BUILDING

GROUPED = "graftline-grouped"
"""`grouped_attention`, as `transformers` knows it."""
_PLAIN = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Architectures (`model_type`) whose attention is the plain one: no soft cap, no sinks."""


def attention_for(folder: Path, device: str) -> str:
    """The implementation that `attention: auto` stands for.

    Args:
        folder: the backbone's, with its config.json.
        device: where it will run.

    Returns:
        `transformers`' name: the device's fused kernel on a GPU; on CPU, where that takes longer
        than matrix products, `GROUPED` or, for unknown architectures, `eager`.
    """
    if device != "cpu":
        return "sdpa"
    config = folder / "config.json"
    known = config.is_file() and json.loads(config.read_text(encoding="utf-8"))
    if not known or known.get("model_type") not in _PLAIN:
        return "eager"
    register()
    return GROUPED


def register() -> None:
    """Makes `GROUPED` known to `transformers`."""
    with BUILDING:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import eager_mask

        AttentionInterface.register(GROUPED, grouped_attention)
        AttentionMaskInterface.register(GROUPED, eager_mask)


def grouped_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_unused: Any,
) -> tuple[Tensor, Tensor]:
    """Grouped-query attention (arXiv 2305.13245) that repeats no keys and no values.

    The queries that share a key stand side by side as more rows of one matrix product, where the
    eager implementation of `transformers` copies each key once a query.

    Args:
        module: the attention layer.
        query: (batch, heads, queries, width).
        key: (batch, key heads, positions, width); heads are a multiple of key heads.
        value: as `key`.
        attention_mask: added to the scores, (batch, 1, queries, positions).
        scaling: of the scores.
        dropout: share of the weights that are dropped in training.

    Returns:
        Mixed values (batch, queries, heads, width), and the weights (batch, heads, queries,
        positions).
    """
    batch, heads, queries, width = query.shape
    grouped = (batch, key.shape[1], -1)
    scores = query.reshape(*grouped, width) @ key.transpose(2, 3) * scaling
    scores = scores.view(batch, heads, queries, -1)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    mixed = weights.reshape(*grouped, weights.shape[-1]) @ value
    return mixed.view(batch, heads, queries, -1).transpose(1, 2).contiguous(), weights
