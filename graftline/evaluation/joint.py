"""Joint questions: conversations over media of two or three modalities.

Each turn shows a medium and asks its question; earlier turns have their right answers, the last is
asked. Nothing like it is trained on. A model that mixes modalities up, or whose merged weights suit
one of them alone, answers for the wrong medium or not at all.

Not several media before one question: a model that saw one medium a prompt answers for the one that
stands where media stood in training, whatever is asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import numpy as np

from graftline.data.examples import ExampleSet
from graftline.evaluation.scoring import JOINT_TASKS, QUESTION
from graftline.model.multimodal import Batch, collate
from graftline.model.prompts import EncodedPrompt, MediaSlot, PromptEncoder

ROWS = 240
"""Conversations of each length, or as many as the smallest modality has rows."""


@dataclass(frozen=True)
class JointQuestion:
    """The rows of a conversation, a turn each; the last one's question is asked.

    Attributes:
        rows: (modality, row of its split).
    """

    rows: tuple[tuple[str, int], ...]

    @property
    def task(self) -> str:
        """The task's name, by the number of media."""
        return JOINT_TASKS[len(self.rows)]


class JointSet:
    """The joint questions of a split, the same for every model.

    Args:
        folders: modality -> a features artifact.
        split: whose rows they are made of.
        encoder: makes the prompts.
    """

    def __init__(self, folders: Mapping[str, Path], split: str, encoder: PromptEncoder) -> None:
        self._sets = {
            name: ExampleSet(folder, name, split, encoder)
            for name, folder in sorted(folders.items())
        }
        self._encoder = encoder
        self.questions = [
            question for media in JOINT_TASKS for question in joint_questions(self._sets, media)
        ]
        last = [question.rows[-1] for question in self.questions]
        self.answers = [list(self._sets[modality].rows[row]["answers"]) for modality, row in last]

    @property
    def tasks(self) -> list[str]:
        """The task of each question."""
        return [question.task for question in self.questions]

    @property
    def ids(self) -> list[str]:
        """What each question is made of: the rows' ids."""
        return [
            " + ".join(str(self._sets[modality].rows[row]["id"]) for modality, row in each.rows)
            for each in self.questions
        ]

    def batches(self, size: int) -> list[tuple[list[int], Batch]]:
        """All questions without their answers, at most `size` of one task a batch."""
        found = []
        for task in JOINT_TASKS.values():
            chosen = [place for place, each in enumerate(self.questions) if each.task == task]
            for start in range(0, len(chosen), size):
                places = chosen[start : start + size]
                found.append((places, self._batch(places)))
        return found

    def _batch(self, places: list[int]) -> Batch:
        prompts, media = [], []
        for place in places:
            rows = self.questions[place].rows
            prompts.append(self._conversation(rows))
            media.append([self._sets[modality].features[row] for modality, row in rows])
        return collate(prompts, media, self._encoder.pad_id)

    def _conversation(self, rows: tuple[tuple[str, int], ...]) -> EncodedPrompt:
        """Turns one behind the other, as ChatML writes them: a line's end behind each answer."""
        between = self._encoder.tokenizer("\n", add_special_tokens=False)["input_ids"]
        token_ids: list[int] = []
        modality_ids: list[int] = []
        for place, (modality, row) in enumerate(rows, start=1):
            text, last = self._sets[modality].rows[row], place == len(rows)
            answer = None if last else text["answers"][0]
            turn = self._encoder.encode([MediaSlot(modality), text["question"]], answer)
            behind = [] if last else [*turn.answer_ids, *between]
            token_ids += [*turn.token_ids, *behind]
            modality_ids += [*turn.modality_ids, *[0] * len(behind)]
        slots = tuple(modality for modality, _ in rows)
        return EncodedPrompt(tuple(token_ids), tuple(modality_ids), slots, ())


def joint_questions(sets: Mapping[str, ExampleSet], media: int) -> list[JointQuestion]:
    """Seeded draws, in turn for each choice and order of so many modalities.

    Args:
        sets: modality -> its rows; sorted by modality.
        media: how many stand in a prompt.

    Returns:
        None where there are fewer modalities than that.
    """
    orders = list(permutations(sets, media))
    count = min(ROWS, *(len(examples) for examples in sets.values())) if orders else 0
    generator = np.random.Generator(np.random.PCG64(media))
    questions = {
        name: [row for row, each in enumerate(examples.rows) if each["task"] == QUESTION]
        for name, examples in sets.items()
    }
    found = []
    for number in range(count):
        order = orders[number % len(orders)]
        drawn = [int(generator.integers(len(questions[name]))) for name in order]
        rows = ((name, questions[name][draw]) for name, draw in zip(order, drawn, strict=True))
        found.append(JointQuestion(tuple(rows)))
    return found
