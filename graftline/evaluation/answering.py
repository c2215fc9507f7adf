"""Asking a model every row's question, in batches with a KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graftline.data.examples import ExampleSet, question_batches
from graftline.model.loading import LoadedModel
from graftline.progress import track


def answer_all(
    loaded: LoadedModel, examples: ExampleSet, *, batch_size: int, max_new_tokens: int, label: str
) -> list[str]:
    """The model's greedy answer to every row, in the rows' order."""
    answers = [""] * len(examples)
    tokenizer = loaded.tokenizer
    batches = question_batches(examples, batch_size)
    with track(label, len(examples)) as advance:
        for rows, batch in batches:
            tokens = loaded.model.generate(
                batch.to(loaded.model.device),
                max_new_tokens,
                loaded.prompts.pad_id,
                tokenizer.eos_token_id,
            )
            for row, text in zip(rows, _decode(tokenizer, tokens.tolist()), strict=True):
                answers[row] = text
                advance("")
    return answers


def _decode(tokenizer: Any, rows: Sequence[Sequence[int]]) -> list[str]:
    return [text.strip() for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]
