"""Which connectors of a finished run's last merge need realigning, predicted without training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftline.errors import GraftlineError
from graftline.methods import method_named
from graftline.model.opening import open_backbone
from graftline.planning.plan import Model, Planner, Reference
from graftline.planning.realigning import RealignPlanner
from graftline.realignment.correction import first_readings
from graftline.realignment.distilling import with_last_layer
from graftline.realignment.drift import answer_drift, reading_drift, second_moment
from graftline.realignment.statistics import read_statistics
from graftline.recipe import Recipe
from graftline.steps.execution import execute
from graftline.steps.work import Machine
from graftline.store import Store

_MOMENT_SAMPLES = 1000


@dataclass(frozen=True)
class ConnectorDrift:
    """What a merge did to one connector.

    Attributes:
        modality: whose.
        readings: how much the first layers' readings of its tokens moved, as a share.
        answers: KL(old || merged) of the answers to drawn media, nats a token.
    """

    modality: str
    readings: float
    answers: float


def connector_drifts(
    recipe: Recipe,
    data_files: Mapping[str, Mapping[str, str]],
    store: Store,
    machine: Machine,
    samples: int,
) -> list[ConnectorDrift]:
    """Predicts for every connector of the last stage, by what was recorded of its modality.

    Statistics that are not in the store are recorded, which takes seconds; nothing is trained.

    Args:
        recipe: of a method that merges; its run is finished up to the last merge.
        data_files: modality -> split -> md5 of its parquet file.
        store: its artifacts.
        machine: where it is computed.
        samples: media that are drawn a modality.

    Raises:
        GraftlineError: the method does not merge, or a part of the run is missing.
    """
    planner = Planner(recipe, data_files)
    stages = method_named(recipe.method)(planner, recipe.order)
    last = stages[-1] if len(stages) > 1 else None
    if last is None or last.merged is None or last.vanilla is None:
        raise GraftlineError(
            f"{recipe.method} has no merge that a connector could suffer from; choose --method mera"
        )
    steps, before = RealignPlanner.beside(planner), stages[-2].final
    asking = _Asking(recipe, steps, store, samples)
    found = []
    for stage in stages:
        name = stage.modality
        old = last.vanilla if stage is last else before
        recorded = steps.statistics(old, name, stage.index)
        execute(steps.steps[recorded], store, machine)
        found.append(asking.compare(name, old, last.merged, recorded))
    return found


class _Asking:
    """What comparing two backbones beside one connector needs; each backbone is opened once."""

    def __init__(self, recipe: Recipe, steps: RealignPlanner, store: Store, samples: int) -> None:
        self.recipe, self.steps, self.store, self.samples = recipe, steps, store, samples
        self._open: dict[Reference, tuple[Any, Any]] = {}

    def folder(self, part: Reference) -> Path:
        artifact = self.store.find(part.kind, part.fingerprint)
        if artifact is None:
            title = self.steps.steps[part].title
            raise GraftlineError(f"{title}: is not in {self.store.root}; run the recipe first")
        return artifact.folder

    def open(self, part: Reference) -> tuple[Any, Any]:
        if part not in self._open:
            recipe, folder = self.recipe, self.folder(part) / "backbone"
            device = Machine(Path(recipe.data.folder), recipe.execution.device).torch_device
            attention = recipe.backbone.attention
            self._open[part] = open_backbone(folder, recipe.precision, attention, device)
        return self._open[part]

    def compare(self, name: str, old: Model, new: Model, recorded: Reference) -> ConnectorDrift:
        statistics = read_statistics(self.folder(recorded))
        connector, prompt = self.folder(old.connectors[name]), self.recipe.backbone.system_prompt
        teacher = with_last_layer(self.open(old.backbone), name, connector, prompt)
        student = with_last_layer(self.open(new.backbone), name, connector, prompt)
        drawn, _ = statistics.sample(_MOMENT_SAMPLES, self.recipe.seed)
        layers = self.recipe.correction.layers
        readings = [
            first_readings(self.folder(part) / "backbone", layers)
            for part in (old.backbone, new.backbone)
        ]
        answers = answer_drift(
            teacher,
            student,
            name,
            statistics,
            samples=self.samples,
            max_new_tokens=self.recipe.evaluation.max_new_tokens,
            seed=self.recipe.seed,
        )
        moment = second_moment(teacher, name, drawn)
        return ConnectorDrift(name, reading_drift(readings[0], readings[1], moment), answers)
