"""What the generated rows look like."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graftline.data import sounds, videos, wording
from graftline.data.drawing import Digits, held_out_first
from graftline.data.images import PAIRS, paint
from graftline.data.parts import MNIST_5K, TIMGM6MB, fetch
from graftline.data.rows import MODALITIES, SPLITS, TASKS, decode, read_split
from graftline.data.shapes import SHAPES
from graftline.errors import GraftlineError

CLASSES: dict[str, tuple[str, ...]] = {
    "image": wording.DIGITS,
    "audio": tuple(sounds.PROGRAMS),
    "video": wording.DIRECTIONS,
    "point_cloud": tuple(SHAPES),
}
SHAPE = {"image": (64, 64, 3), "audio": (16000,), "video": (6, 64, 64, 3), "point_cloud": (512, 3)}


def split_rows(folder: Path, modality: str, split: str) -> list[dict[str, Any]]:
    return list(read_split(folder, modality, split))


@pytest.mark.parametrize("modality", MODALITIES)
def test_rows_are_well_formed(built: Path, modality: str) -> None:
    for split in SPLITS:
        for index, row in enumerate(split_rows(built, modality, split)):
            assert row["id"] == f"{modality}-{split}-{index:05d}"
            assert row["task"] == TASKS[index % 2]
            assert decode(row["media"], modality).shape == SHAPE[modality]
            if row["task"] == "question":
                asked = wording.DIRECTION_QUESTION if modality == "video" else wording.QUESTION
                assert (row["question"], len(row["answers"])) == (asked, 1)
            else:
                assert (row["question"], len(row["answers"])) == (wording.CAPTION, 2)
                # fewer than four words could not reach a full CIDEr-D
                assert all(4 <= len(caption.split()) <= 8 for caption in row["answers"])


@pytest.mark.parametrize("modality", MODALITIES)
def test_every_class_is_in_both_tasks(built: Path, modality: str) -> None:
    rows = split_rows(built, modality, "train")
    for task in TASKS:
        texts = [f" {row['answers'][0]} ".lower() for row in rows if row["task"] == task]
        for name in CLASSES[modality]:
            assert any(name in text.replace(".", " ").replace(",", " ") for text in texts), name


def test_no_media_twice_and_no_source_in_two_splits(built: Path) -> None:
    hashes: list[str] = []
    splits_of: dict[str, set[str]] = {}
    for modality in MODALITIES:
        for split in SPLITS:
            for row in split_rows(built, modality, split):
                hashes.append(hashlib.sha256(row["media"]).hexdigest())
                splits_of.setdefault(row["source"], set()).add(split)
    assert max(Counter(hashes).values()) == 1
    assert all(len(splits) == 1 for splits in splits_of.values())


def test_held_out_digits_are_handed_out_once() -> None:
    images, films = Digits("image", 0), Digits("video", 0)
    sources = [digits.take(3, "test")[1] for digits in (images, films) for _ in range(250)]
    assert len(set(sources)) == 500
    for split in ("test", "train"):
        with pytest.raises(GraftlineError, match=f"no handwritten 3 is left for the {split}"):
            images.take(3, split)


def test_training_digits_come_back_in_turn_and_stay_in_training() -> None:
    digits = Digits("image", 0)
    held_out = {digits.take(3, split)[1] for split in ("validation", "test") for _ in range(100)}
    training = [digits.take(3, "train")[1] for _ in range(300)]
    assert len(set(training)) == 50 and training[50:100] == training[:50]
    assert not held_out & set(training)
    with pytest.raises(GraftlineError, match="no handwritten 3 is left for the test"):
        digits.take(3, "test")


def test_held_out_splits_are_served_first_whatever_the_order_of_sizes() -> None:
    assert held_out_first({"train": 9, "test": 2, "validation": 1}) == [
        ("test", 2), ("validation", 1), ("train", 9)
    ]  # fmt: skip


def test_digit_pictures_carry_their_labels() -> None:
    digits = Digits("image", 0)
    table = np.genfromtxt(fetch(MNIST_5K), delimiter=",", dtype=np.int64, usecols=784)
    for digit in range(10):
        picture, source = digits.take(digit, "train")
        assert picture.shape == (28, 28)
        assert table[int(source.split(":")[1])] == digit


def test_keys_of_splits_are_disjoint_and_far_apart_between_registers() -> None:
    for program in sounds.PROGRAMS.values():
        keys = [
            (split, register, key)
            for split in SPLITS
            for register in wording.REGISTERS
            for key in sounds.keys_of(split, program, register, 0)
        ]
        assert len({key for _, _, key in keys}) == len(keys) == 36
        ranges = {
            name: [key for _, register, key in keys if register == name]
            for name in wording.REGISTERS
        }
        assert max(ranges["low"]) + 1 < min(ranges["middle"])
        assert max(ranges["middle"]) + 1 < min(ranges["high"])
    with pytest.raises(GraftlineError, match="dev"):
        sounds.keys_of("dev", 0, "low", 0)


def test_a_note_does_not_depend_on_earlier_notes() -> None:
    player = sounds.Player(fetch(TIMGM6MB))
    first = player.play(40, 60, 100)
    player.play(52, 50, 127)
    player.play(125, 80, 120)
    assert np.array_equal(player.play(40, 60, 100), first)
    assert np.array_equal(sounds.Player(fetch(TIMGM6MB)).play(40, 60, 100), first)
    assert np.abs(first).max() == 1.0


def test_gate_places_and_cuts_a_note() -> None:
    clip = sounds.gate(np.ones(16000), start=0.1, sounding=0.2, level=0.5)
    assert (len(clip), clip.dtype) == (16000, np.int16)
    assert not clip[:1600].any()
    assert not clip[1600 + 3200 + 480 :].any()
    assert (clip[1600 : 1600 + 3200] == round(0.5 * 32767)).all()


@pytest.mark.parametrize("direction", wording.DIRECTIONS)
@pytest.mark.parametrize("speed", wording.SPEEDS)
def test_films_move_as_they_say(direction: str, speed: str) -> None:
    digit = np.zeros((28, 28), dtype=np.uint8)
    digit[10:18, 10:18] = 255
    frames = videos.film(digit, direction, speed, (2, -3)).astype(np.float64)
    mass = frames.sum(axis=(1, 2))
    across = (frames.sum(axis=1) * np.arange(64)).sum(axis=1) / mass
    down = (frames.sum(axis=2) * np.arange(64)).sum(axis=1) / mass
    right_step, down_step = videos.way_of(direction)
    step = videos.STEPS[speed]
    assert np.diff(across) == pytest.approx(right_step * step, abs=1e-6)
    assert np.diff(down) == pytest.approx(down_step * step, abs=1e-6)


def test_eighty_pairs_hold_every_digit_and_direction() -> None:
    for task in (0, 1):
        kinds = [videos.kind_of(2 * pair + task) for pair in range(80)]
        assert len(set(kinds)) == 80


def test_paint_gives_ink_and_paper() -> None:
    digit = np.array([[0, 255]], dtype=np.uint8)
    for ink, paper in PAIRS:
        left, right = paint(digit, ink, paper)[0].tolist()
        assert abs(sum(left) - sum(right)) > 200
    assert paint(digit, "red", "white").tolist() == [[[255, 255, 255], [220, 20, 20]]]


def test_point_clouds_fit_the_unit_ball(built: Path) -> None:
    for row in split_rows(built, "point_cloud", "test"):
        points = decode(row["media"], "point_cloud")
        radius = np.linalg.norm(points, axis=1).max()
        assert 0.3 < radius <= 1.001
        assert len(np.unique(points, axis=0)) > 450
