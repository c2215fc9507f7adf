"""Perplexity of a fixed held-out text: what the LLM still knows of plain language."""

from __future__ import annotations

import math
from importlib.resources import files
from typing import Any

import torch
from torch import nn


def held_out_text() -> str:
    """The fixed text, written for this project and so in no model's training data."""
    return files("graftline.evaluation").joinpath("held_out.txt").read_text(encoding="utf-8")


@torch.inference_mode()
def text_perplexity(backbone: Any, tokenizer: Any, text: str | None = None) -> float:
    """Exp of the mean negative log-likelihood per token of a text, in windows of a paragraph.

    Args:
        backbone: a causal LM.
        tokenizer: its tokenizer.
        text: the held-out text when left out; paragraphs are parted by empty lines.
    """
    total, count = 0.0, 0
    for paragraph in (text or held_out_text()).split("\n\n"):
        ids = tokenizer(paragraph.strip(), add_special_tokens=False, return_tensors="pt")
        token_ids = ids["input_ids"].to(backbone.device)
        if token_ids.shape[1] < 2:
            continue
        logits = backbone(input_ids=token_ids, use_cache=False).logits[0, :-1].float()
        loss = nn.functional.cross_entropy(logits, token_ids[0, 1:], reduction="sum")
        total, count = total + float(loss), count + token_ids.shape[1] - 1
    return math.exp(total / count)
