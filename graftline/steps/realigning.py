"""Carrying out the steps that go beyond MERA's four."""

from __future__ import annotations

import json

import pyarrow.parquet as pq

from graftline.data.examples import ROWS
from graftline.data.features import FeatureTable
from graftline.model.loading import ConnectorRecord, read_connector, read_record, save_connector
from graftline.model.opening import open_backbone
from graftline.realignment.correction import correcting_map, first_readings, fold_into
from graftline.realignment.decoupling import decouple
from graftline.realignment.distilling import Lesson, Teacher
from graftline.realignment.distilling import distil as train_distilled
from graftline.realignment.statistics import (
    inner_vectors,
    read_statistics,
    save_statistics,
    statistics_of,
)
from graftline.realignment.weighted_merge import merge_weighted
from graftline.steps.work import (
    Work,
    call_of,
    check_untouched,
    phase_settings,
    realign_settings,
    seen_share,
)
from graftline.training import phases


def weighted_merge(work: Work) -> None:
    """Merges two backbones by coefficients."""
    parameters = work.step.parameters
    used = merge_weighted(
        work.parents["previous"].folder / "backbone",
        work.parents["vanilla"].folder / "backbone",
        parameters["coefficient"],
        parameters["depth"],
        work.out / "backbone",
    )
    check_untouched(work)
    (work.out / "coefficients.json").write_text(json.dumps(used, indent=2), encoding="utf-8")


def statistics(work: Work) -> None:
    """Records what later stages need to know of a modality's media."""
    parameters = work.step.parameters
    modality = parameters["modality"]
    folder, features = work.role("connector")[modality], work.role("features")[modality]
    connector = read_connector(folder, read_record(folder, modality))
    inner = inner_vectors(connector, FeatureTable(features / "train")[:])
    asked = pq.read_table(features / "train" / ROWS, columns=["question"])["question"].to_pylist()
    save_statistics(
        work.out, statistics_of(inner, asked, parameters["clusters"], parameters["seed"])
    )


def correct(work: Work) -> None:
    """Corrects a connector in closed form."""
    parameters = work.step.parameters
    modality = parameters["modality"]
    folder = work.role("connector")[modality]
    old = read_record(folder, modality)
    connector = read_connector(folder, old)
    before, after = (
        first_readings(work.parents[role].folder / "backbone", parameters["layers"])
        for role in ("old", "backbone")
    )
    fold_into(connector, correcting_map(before, after, parameters["ridge"]), parameters["seed"])
    record = ConnectorRecord(modality, old.shape, work.parents["backbone"].fingerprint)
    save_connector(work.out, record, connector)


def distil(work: Work) -> None:
    """Realigns a connector from the old model."""
    parameters = work.step.parameters
    modality = parameters["modality"]
    recorded = work.role("statistics").get(modality)
    lesson = Lesson(
        statistics=read_statistics(recorded) if recorded else None,
        samples=parameters.get("samples", 0),
        max_new_tokens=parameters.get("max_new_tokens", 0),
        fraction=parameters.get("fraction", 0.0) if recorded else 1.0,
        temperature=parameters["temperature"],
        answers=parameters["answers"],
    )
    old = work.parents["old"].folder / "backbone"
    place = work.machine.torch_device
    backbone = open_backbone(old, parameters["precision"], parameters["attention"], place)
    train_distilled(
        call_of(work),
        phase_settings(parameters),
        modality,
        work.role("connector")[modality],
        Teacher(backbone, work.role("taught")[modality]),
        lesson,
    )


def realign_masked(work: Work) -> None:
    """Realigns a connector on its replay, beside its modality's decoupled weights."""
    parameters = work.step.parameters
    modality = parameters["modality"]
    call = call_of(work)
    base = work.parents["base"].folder / "backbone"
    decouple(call.backbone[0], work.parents["backbone"].folder, base, modality)
    phases.realign(
        call,
        realign_settings(work),
        modality,
        work.role("connector")[modality],
        seen_share(work),
        parameters["part"],
    )
