"""One step being carried out: its parents, its machine, and what training needs of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from graftline.data.examples import replay_rows
from graftline.errors import GraftlineError
from graftline.merging.backbones import changed_tensors
from graftline.model.opening import device_named, open_backbone
from graftline.planning.costs import train_rows
from graftline.planning.plan import Step
from graftline.recipe import PhaseSettings, Recipe
from graftline.store import Artifact
from graftline.team import current
from graftline.training import elastic, optimizer, phases
from graftline.training.passes import within_passes

CORES = torch.get_num_threads()
_ON_CPU, _ON_GPU = optimizer.PIECE, 1 << 26
"""Elements that are updated together: on a GPU as a rule a whole parameter, at most 256 MB."""


@dataclass(frozen=True)
class Machine:
    """Where a step runs: what its result must not depend on.

    Attributes:
        data_folder: the data.
        device: as in a recipe.
        slots: how many steps share the machine.
        processes: how many train one step together, a GPU each.
        shard: each of them holds a share of the backbone's weights.
        feature_shares: in how many shares machines encode media, apart from each other.
    """

    data_folder: Path
    device: str = "auto"
    slots: int = 1
    processes: int = 1
    shard: bool = False
    feature_shares: int = 1

    @classmethod
    def of(cls, recipe: Recipe) -> Machine:
        """The machine that a recipe describes."""
        given = recipe.execution
        shares = given.feature_shares if given.where == "workers" else 1
        return cls(
            Path(recipe.data.folder),
            given.device,
            given.slots,
            given.processes,
            given.shard,
            shares,
        )

    @property
    def threads(self) -> int:
        """Threads that a step computes with."""
        return max(1, CORES // self.slots)

    @property
    def torch_device(self) -> str:
        """The device itself where the recipe says `auto`."""
        return device_named(self.device)


@dataclass(frozen=True)
class Work:
    """One step being carried out.

    Attributes:
        step: the step.
        parents: role -> published artifact.
        machine: where.
        folder: for checkpoints; outlives a kill.
        out: to be filled.
    """

    step: Step
    parents: dict[str, Artifact]
    machine: Machine
    folder: Path
    out: Path

    def role(self, prefix: str) -> dict[str, Path]:
        """Folders of the parents whose role is `prefix.<modality>`, by modality."""
        return {
            role.partition(".")[2]: artifact.folder
            for role, artifact in self.parents.items()
            if role.startswith(f"{prefix}.")
        }


def set_pieces(device: str) -> None:
    """Has this process train in pieces that suit a device.

    Those of a CPU fit in a core's cache. On a GPU they would be hundreds of tiny kernels a step, or
    thousands. Each element is updated by itself, so weights do not depend on it.
    """
    pieces = _ON_CPU if torch.device(device).type == "cpu" else _ON_GPU
    optimizer.PIECE = pieces
    elastic.PIECE = pieces  # type: ignore[attr-defined]  # it imported the number


def call_of(work: Work) -> phases.Call:
    """What a training phase needs of a step."""
    parameters = work.step.parameters
    return phases.Call(
        backbone=load(work),
        backbone_fingerprint=work.parents["backbone"].fingerprint,
        features=work.role("features"),
        system_prompt=parameters["system_prompt"],
        seed=parameters["seed"],
        work=work.folder,
        out=work.out,
        label=work.step.title,
    )


def load(work: Work) -> tuple[Any, Any]:
    """The step's backbone and its tokenizer."""
    given, folder = work.step.parameters, work.parents["backbone"].folder / "backbone"
    place = "cpu" if current().shard else None  # its share goes to the device later
    device = work.machine.torch_device
    return open_backbone(folder, given["precision"], given["attention"], device, place)


def realign_settings(work: Work) -> PhaseSettings:
    """A realigning step's settings of the loop, shorter where its passes over the replay say so."""
    parameters = work.step.parameters
    settings, passes = phase_settings(parameters), parameters.get("passes")
    if passes is None:
        return settings
    rows = train_rows(work.role("features")[parameters["modality"]])
    kept = len(replay_rows(rows, seen_share(work), parameters["seed"]))
    return within_passes(settings, passes, kept)


def seen_share(work: Work) -> float:
    """Share of its modality's training rows that a realigning step sees: all if none is named."""
    return float(work.step.parameters.get("fraction", 1.0))


def phase_settings(parameters: Any) -> PhaseSettings:
    """A training step's settings of the loop."""
    return PhaseSettings(**{k: v for k, v in parameters.items() if k in PhaseSettings.model_fields})


def check_untouched(work: Work) -> None:
    """Compares a merge bit by bit with what it was made of, before it is published.

    What fine-tuning left as it was (embeddings, as a rule) must be as it was; connectors and
    encoders are other artifacts, which no merge writes.

    Raises:
        GraftlineError: names a tensor that the merge changed and no training had.
    """
    previous, vanilla = (work.parents[role].folder / "backbone" for role in ("previous", "vanilla"))
    learned = set(changed_tensors(previous, vanilla))
    surplus = [n for n in changed_tensors(previous, work.out / "backbone") if n not in learned]
    if surplus:
        raise GraftlineError(
            f"{work.step.label}: the merge changed {surplus[0]} ({len(surplus)} such), which "
            "fine-tuning had left as it was; nothing is published."
        )
