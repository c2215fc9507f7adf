"""Asking a model every row's question, in batches with a KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graftline.data.examples import ExampleSet, question_batches
from graftline.model.loading import LoadedModel
from graftline.model.multimodal import Batch
from graftline.progress import track
from graftline.team import current


def answer_all(
    loaded: LoadedModel, examples: ExampleSet, *, batch_size: int, max_new_tokens: int, label: str
) -> list[str]:
    """The model's greedy answer to every row, in the rows' order."""
    batches = question_batches(examples, batch_size)
    return answer_batches(loaded, batches, max_new_tokens=max_new_tokens, label=label)


def answer_batches(
    loaded: LoadedModel,
    batches: Sequence[tuple[list[int], Batch]],
    *,
    max_new_tokens: int,
    label: str,
) -> list[str]:
    """The model's greedy answers to batches of prompts; a team shares the batches.

    Args:
        loaded: the model.
        batches: the places that a batch's answers take, and the batch; together all places.
        max_new_tokens: the longest answer.
        label: what the progress bar says.
    """
    team, tokenizer = current(), loaded.tokenizer
    own = team.own(batches)
    said: list[tuple[int, str]] = []
    with track(label, sum(len(places) for places, _ in own)) as advance:
        for rows, batch in own:
            tokens = loaded.model.generate(
                batch.to(loaded.model.device),
                max_new_tokens,
                loaded.prompts.pad_id,
                tokenizer.eos_token_id,
            )
            for row, text in zip(rows, _decode(tokenizer, tokens.tolist()), strict=True):
                said.append((row, text))
                advance("")
    answers = dict(pair for each in team.gathered(said) for pair in each)
    return [answers[row] for row in range(len(answers))]


def _decode(tokenizer: Any, rows: Sequence[Sequence[int]]) -> list[str]:
    return [text.strip() for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]
