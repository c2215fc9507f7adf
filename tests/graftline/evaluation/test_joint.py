"""Questions over several modalities: what they are made of, and how a model is asked."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import pytest
import torch

from graftline.data.features import FeatureTable
from graftline.evaluation.answering import answer_batches
from graftline.evaluation.joint import JointSet
from graftline.evaluation.scoring import score_rows
from graftline.model.loading import LoadedModel, assemble, new_connector

NAMES = ("audio", "image", "video")


@pytest.fixture
def loaded(tiny) -> LoadedModel:
    rows = torch.randn(32, 3, 8, generator=torch.Generator().manual_seed(3))
    shape = {"tokens": 2, "hidden": 16}
    pairs = [new_connector(name, tiny[0], rows, shape, 0, "backbone1") for name in NAMES]
    return assemble(tiny, pairs, "")


@pytest.fixture
def joint(loaded: LoadedModel, features_folder: Path) -> JointSet:
    return JointSet(dict.fromkeys(NAMES, features_folder), "test", loaded.prompts)


def test_every_order_of_modalities_is_asked(joint: JointSet) -> None:
    assert joint.tasks == ["two media"] * 16 + ["three media"] * 16
    for media in (2, 3):
        orders = {
            tuple(modality for modality, _ in question.rows)
            for question in joint.questions
            if len(question.rows) == media
        }
        assert orders == set(permutations(NAMES, media))


def test_earlier_turns_are_answered_and_the_last_is_asked(
    joint: JointSet, loaded: LoadedModel
) -> None:
    words = ("red", "green", "blue", "black")
    tokenizer, numbers = loaded.tokenizer, loaded.model.modality_numbers
    table = FeatureTable(joint._sets["image"].features.path.parent)
    for places, batch in joint.batches(5):
        assert len(places) <= 5
        for line, place in enumerate(places):
            rows = joint.questions[place].rows
            assert joint.answers[place] == [words[rows[-1][1] % 4]]
            kept = batch.attention_mask[line].bool()
            text = tokenizer.decode(batch.token_ids[line][kept & (batch.modality_ids[line] == 0)])
            turns = ["<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n" for _ in rows]
            for turn, (_, row) in enumerate(rows[:-1]):
                turns[turn] += f"{words[row % 4]}<|im_end|>\n"
            assert text == "".join(turns)
            ids = [number for number in batch.modality_ids[line].tolist() if number]
            assert ids == [numbers[modality] for modality, _ in rows for _ in range(2)]
    first_places, first = joint.batches(1)[0]
    modality, row = joint.questions[first_places[0]].rows[0]
    assert torch.equal(first.media[modality][0], table[row])


def test_the_same_questions_for_every_model(
    joint: JointSet, loaded: LoadedModel, features_folder: Path
) -> None:
    folders = dict.fromkeys(reversed(NAMES), features_folder)
    again = JointSet(folders, "test", loaded.prompts)
    assert again.questions == joint.questions
    assert again.ids == joint.ids
    assert all(name.startswith("image-test-") for each in joint.ids for name in each.split(" + "))


def test_one_modality_has_none(loaded: LoadedModel, features_folder: Path) -> None:
    alone = JointSet({"image": features_folder}, "test", loaded.prompts)
    assert alone.questions == []
    assert alone.batches(4) == []


def test_answers_are_scored_by_exact_match(joint: JointSet, loaded: LoadedModel) -> None:
    answers = answer_batches(loaded, joint.batches(7), max_new_tokens=4, label="")
    single = answer_batches(loaded, joint.batches(1), max_new_tokens=4, label="")
    assert answers == single
    right = [each[0] for each in joint.answers]
    assert score_rows(joint.tasks, right, joint.answers) == [1.0] * len(right)
    assert sum(score_rows(joint.tasks, ["nothing"] * len(right), joint.answers)) == 0.0
