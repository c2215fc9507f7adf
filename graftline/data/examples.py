"""Examples ready for the model: rows, their features, their encoded prompts, and batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from torch import Tensor

from graftline.data.features import FeatureTable
from graftline.model.multimodal import Batch, collate
from graftline.model.prompts import EncodedPrompt, MediaSlot, PromptEncoder
from graftline.team import Team, current

BUCKET = 8
"""Batches whose rows are sorted by length together."""
ROWS = "rows.parquet"
"""A features artifact's copy of the rows' text, beside each split's features."""


class ExampleSet:
    """Rows of one modality and split with their cached features.

    Args:
        folder: a features artifact.
        modality: whose rows they are.
        split: train, validation or test.
        encoder: makes the prompts.
    """

    def __init__(self, folder: Path, modality: str, split: str, encoder: PromptEncoder) -> None:
        self.modality = modality
        self.rows: list[dict[str, Any]] = pq.read_table(folder / split / ROWS).to_pylist()
        self.features = FeatureTable(folder / split)
        self._encoder = encoder
        self.pad_id = encoder.pad_id
        self._prompts: dict[tuple[int, bool], EncodedPrompt] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def prompt(self, index: int, with_answer: bool) -> EncodedPrompt:
        """The prompt of one row: the medium, the question and, to train on, the first answer."""
        key = (index, with_answer)
        if key not in self._prompts:
            row = self.rows[index]
            parts = [MediaSlot(self.modality), row["question"]]
            answer = row["answers"][0] if with_answer else None
            self._prompts[key] = self._encoder.encode(parts, answer)
        return self._prompts[key]


class TrainingSet:
    """Examples of one or more modalities, and which of them a training step sees.

    Args:
        sets: the modalities' examples.
        chosen: for each set the row numbers that may be used (all when left out).
        batch_size: examples a step.
        seed: of the order.
    """

    def __init__(
        self,
        sets: Sequence[ExampleSet],
        batch_size: int,
        seed: int,
        chosen: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.sets = list(sets)
        chosen = chosen or [range(len(examples)) for examples in sets]
        self.places = [(number, int(row)) for number, rows in enumerate(chosen) for row in rows]
        self.batch_size, self.seed = batch_size, seed
        self._lengths = [
            len(prompt.token_ids) + len(prompt.answer_ids)
            for prompt in (self.sets[number].prompt(row, True) for number, row in self.places)
        ]
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def batch(self, step: int) -> Batch:
        """The batch of a step, or a process's part of it: a function of data, seed and step."""
        per_epoch = max(1, -(-len(self.places) // self.batch_size))
        epoch, within = divmod(step, per_epoch)
        indices, team = self._epoch(epoch)[within], current()
        return self._collate(indices) if team.size == 1 else self._part(indices, team)

    def _part(self, indices: Sequence[int], team: Team) -> Batch:
        """A process's rows; its loss counts by its answers' tokens, which make up the batch's mean.

        Where a batch has fewer rows than the team processes, some go along with a row of no weight.
        """
        own = team.own(indices)
        weight = team.size * self._answer_tokens(own) / self._answer_tokens(indices)
        return replace(self._collate(own or indices[:1]), weight=weight)

    def _answer_tokens(self, indices: Sequence[int]) -> int:
        places = (self.places[index] for index in indices)
        return sum(len(self.sets[number].prompt(row, True).answer_ids) for number, row in places)

    def _make_epoch(self, epoch: int) -> list[list[int]]:
        """A permutation cut into batches of similar length, which wastes little padding."""
        generator = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        order = generator.permutation(len(self.places))
        size, bucket = self.batch_size, self.batch_size * BUCKET
        batches = []
        for start in range(0, len(order), bucket):
            near = sorted(order[start : start + bucket], key=lambda place: self._lengths[place])
            batches += [near[first : first + size] for first in range(0, len(near), size)]
        return [[int(i) for i in batches[i]] for i in generator.permutation(len(batches))]

    def _collate(self, indices: Sequence[int]) -> Batch:
        places = [self.places[index] for index in indices]
        prompts = [self.sets[number].prompt(row, True) for number, row in places]
        media = [[self.sets[number].features[row]] for number, row in places]
        return collate(prompts, media, self.sets[0].pad_id)


def replay_rows(count: int, fraction: float, seed: int) -> list[int]:
    """The rows that are kept for later stages: a seeded random share, at least one, sorted."""
    generator = np.random.Generator(np.random.PCG64([seed, count]))
    kept = max(1, round(count * fraction))
    return sorted(int(row) for row in generator.permutation(count)[:kept])


def question_batches(examples: ExampleSet, size: int) -> list[tuple[list[int], Batch]]:
    """All rows without their answers in batches of one task and similar prompt length."""
    order = sorted(
        range(len(examples)),
        key=lambda row: (examples.rows[row]["task"], len(examples.prompt(row, False).token_ids)),
    )
    batches: list[list[int]] = []
    for row in order:
        fits = (
            batches
            and len(batches[-1]) < size
            and examples.rows[batches[-1][0]]["task"] == examples.rows[row]["task"]
        )
        if fits:
            batches[-1].append(row)
        else:
            batches.append([row])
    return [(rows, _without_answers(examples, rows)) for rows in batches]


def _without_answers(examples: ExampleSet, rows: Sequence[int]) -> Batch:
    prompts = [examples.prompt(row, False) for row in rows]
    media: list[list[Tensor]] = [[examples.features[row]] for row in rows]
    return collate(prompts, media, examples.pad_id)
