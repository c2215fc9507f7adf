"""Realigning from the old model on the tiny model: its answers come back, without a row."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from graftline.data.examples import ExampleSet
from graftline.data.features import FeatureTable
from graftline.model.backbone import load_backbone
from graftline.model.loading import read_connector, read_record, save_connector
from graftline.realignment.distilling import Lesson, Teacher, distil, with_last_layer
from graftline.realignment.drift import (
    answer_drift,
    rank_correlation,
    reading_drift,
    second_moment,
)
from graftline.realignment.statistics import TokenStatistics, inner_vectors, statistics_of
from graftline.recipe import LoraSettings, PhaseSettings
from graftline.training import phases

SETTINGS = PhaseSettings(steps=80, batch_size=8, learning_rate=3e-3)


def call_for(backbone: Path, name: str, features: Path, tmp_path: Path) -> phases.Call:
    (tmp_path / name).mkdir()
    return phases.Call(
        backbone=load_backbone(backbone, torch.float32, "eager"),
        backbone_fingerprint=f"backbone of {name}",
        features={"image": features},
        system_prompt="",
        seed=3,
        work=tmp_path / f"{name}-work",
        out=tmp_path / name,
        label=name,
    )


@pytest.fixture
def sharp(tiny_folder: Path, tmp_path: Path) -> Path:
    """The tiny model with larger embeddings, so that it says some words rather than others."""
    folder = tmp_path / "sharp"
    shutil.copytree(tiny_folder, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] *= 20
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def old(sharp: Path, features_folder: Path, tmp_path: Path) -> Path:
    """A tiny model that knows its modality, with its connector."""
    settings = PhaseSettings(steps=40, batch_size=8, learning_rate=3e-3)
    call = call_for(sharp, "aligned", features_folder, tmp_path)
    phases.align(call, settings, "image", {"tokens": 2, "hidden": 16})
    call = call_for(sharp, "old", features_folder, tmp_path)
    call = replace(call, backbone_fingerprint="backbone of aligned")
    phases.fine_tune(
        call, settings, {"image": tmp_path / "aligned"}, mode="full", lora=LoraSettings(),
        connector_learning_rate=1e-3, train_embeddings=False, result_fingerprint="old",
    )  # fmt: skip
    return tmp_path / "old"


@pytest.fixture
def broken(old: Path, tmp_path: Path) -> Path:
    """Its connector, with another last layer: what it says means something else."""
    record = read_record(old, "image")
    connector = read_connector(old, record)
    noise = torch.randn(connector.project.weight.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        connector.project.weight.add_(noise * connector.project.weight.std())
    (tmp_path / "broken").mkdir()
    save_connector(tmp_path / "broken", record, connector)
    return tmp_path / "broken"


@pytest.fixture
def recorded(old: Path, features_folder: Path) -> TokenStatistics:
    connector = read_connector(old, read_record(old, "image"))
    inner = inner_vectors(connector, FeatureTable(features_folder / "train")[:])
    return statistics_of(inner, ["What?", "Tell me."] * 24, 4, seed=0)


def drift(recorded: TokenStatistics, old: Path, own: Path) -> float:
    """Between the old model and the same with another connector."""
    models = [
        with_last_layer(load_backbone(old / "backbone", torch.float32, "eager"), "image", each, "")
        for each in (old, own)
    ]
    return answer_drift(*models, "image", recorded, samples=40, max_new_tokens=6, seed=99)


def test_the_old_model_s_answers_come_back(broken, old, recorded, tmp_path) -> None:
    lesson = Lesson(recorded, 64, 6, fraction=0.0, temperature=1.0, answers=0.0)
    for name in ("first", "again"):
        teacher = Teacher(load_backbone(old / "backbone", torch.float32, "eager"), old)
        distil(
            call_for(old / "backbone", name, tmp_path / "no rows", tmp_path),
            SETTINGS, "image", broken, teacher, lesson,
        )  # fmt: skip
    new = tmp_path / "first"
    before = drift(recorded, old, broken)
    after = drift(recorded, old, new)
    assert drift(recorded, old, old) < 1e-9
    assert before > 1e-4  # there is something to bring back
    assert after < 0.6 * before
    weights, started, again = (
        load_file(folder / "connector-image.safetensors")
        for folder in (new, broken, tmp_path / "again")
    )
    changed = {name for name in weights if not torch.equal(weights[name], started[name])}
    assert changed == {"project.weight", "project.bias", "gain"}
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert read_record(new, "image").aligned_to == "backbone of first"


def test_kept_rows_are_seen_with_their_own_answers(
    old, recorded, features_folder, tmp_path, monkeypatch
) -> None:
    from graftline.realignment import distilling

    seen: list[list[ExampleSet]] = []
    original = distilling.TrainingSet
    monkeypatch.setattr(
        distilling, "TrainingSet", lambda sets, *rest: (seen.append(sets), original(sets, *rest))[1]
    )
    short = SETTINGS.model_copy(update={"steps": 2})
    for name, statistics, fraction in (("both", recorded, 0.125), ("rows", None, 1.0)):
        teacher = Teacher(load_backbone(old / "backbone", torch.float32, "eager"), old)
        lesson = Lesson(statistics, 16, 4, fraction, temperature=1.0, answers=0.5)
        call = call_for(old / "backbone", name, features_folder, tmp_path)
        distil(call, short, "image", old, teacher, lesson)
    both, rows = seen
    assert [len(each) for each in both] == [16, 6]
    assert [len(each) for each in rows] == [48]
    words = {row["answers"][0] for row in rows[0].rows}
    assert "red" in words
    assert {row["answers"][0] for row in both[1].rows} <= words


def test_drift_of_readings_is_a_share_of_what_was_read(old, recorded) -> None:
    loaded = with_last_layer(
        load_backbone(old / "backbone", torch.float32, "eager"), "image", old, ""
    )
    moment = second_moment(loaded, "image", recorded.centres)
    with torch.no_grad():
        tokens = loaded.model.connectors["image"](recorded.centres).flatten(0, 1).double()
    first, second = torch.randn(9, 64).double(), torch.randn(9, 64).double()
    moved = (tokens @ (second - first).T).square().sum() / (tokens @ first.T).square().sum()
    assert reading_drift(first, second, moment) == pytest.approx(float(moved))
    assert reading_drift(first, first, moment) == 0.0
    assert reading_drift(first, 3 * first, moment) == pytest.approx(4.0)


def test_rank_correlation() -> None:
    assert rank_correlation([1, 2, 3, 4], [0.1, 0.2, 0.5, 0.9]) == pytest.approx(1.0)
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1.0)
    assert rank_correlation([1, 2], [1, 2]) is None
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None
