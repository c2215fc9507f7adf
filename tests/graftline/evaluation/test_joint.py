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


def test_the_last_medium_is_asked_about(joint: JointSet, loaded: LoadedModel) -> None:
    for question, text, answers in zip(joint.questions, joint.texts, joint.answers, strict=True):
        _, row = question.rows[-1]
        assert text == "What?"
        assert answers == [("red", "green", "blue", "black")[row % 4]]
    table = FeatureTable(joint._sets["image"].features.path.parent)
    numbers = loaded.model.modality_numbers
    for places, batch in joint.batches(5):
        assert len(places) <= 5
        for line, place in enumerate(places):
            ids = [number for number in batch.modality_ids[line].tolist() if number]
            wanted = [numbers[modality] for modality, _ in joint.questions[place].rows]
            assert ids == [number for number in wanted for _ in range(2)]
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
