"""Fine-tuning against forgetting: the one training loop with a guard's term in its loss."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from graftline.data.examples import ExampleSet, TrainingSet, replay_rows
from graftline.model.backbone import save_backbone
from graftline.model.connectors import MixerConnector
from graftline.model.loading import (
    ConnectorRecord,
    LoadedModel,
    assemble,
    check_alignment,
    read_connector,
    read_record,
    save_connector,
)
from graftline.model.multimodal import Batch, MultimodalModel
from graftline.recipe import LoraSettings, PhaseSettings
from graftline.training.attention import attention_group
from graftline.training.distillation import (
    answer_logits,
    answer_tokens,
    dark_experience,
    distillation,
)
from graftline.training.elastic import FISHER, ElasticPenalty, weighed_parameters
from graftline.training.lora import fold_lora, wrap_lora
from graftline.training.optimizer import ParameterGroup
from graftline.training.orthogonal import Orthogonality, input_directions, save_subspace
from graftline.training.phases import (
    Call,
    backbone_group,
    connector_group,
    examples_of,
    run_phase,
)

Objective = Callable[[MultimodalModel, Batch], Tensor]
"""What is made small: a model and a batch to a float32 scalar."""
_STAGES = 1_000_003
"""Keeps the seeds of different stages' LoRAs apart: equal ones would start in equal directions."""


@dataclass(frozen=True)
class GuardCall:
    """What keeps a fine-tuning from forgetting.

    Attributes:
        name: the method.
        settings: its own numbers.
        fraction: share of the old modalities' training rows that is kept, where it replays.
        fisher: folder of the earlier stages' Fisher information.
        earlier: folders of the earlier stages' LoRA subspaces, in their order.
    """

    name: str
    settings: Mapping[str, float] = field(default_factory=dict)
    fraction: float | None = None
    fisher: Path | None = None
    earlier: Sequence[Path] = ()


@dataclass(frozen=True, kw_only=True)
class MemoryBatch(Batch):
    """A batch of new rows, and one of replayed rows beside it.

    Attributes:
        memory: the replayed rows.
        new_weight: of the new rows' loss; the memory has its own, where processes share both.
    """

    memory: Batch
    new_weight: float = 1.0

    def to(self, device: torch.device | str) -> MemoryBatch:
        """Moves every tensor of both to `device`."""
        return replace(self, **vars(super().to(device)), memory=self.memory.to(device))

    @property
    def tokens(self) -> int:
        """Positions that are not padding, of both."""
        parts = ((super().tokens, self.new_weight), (self.memory.tokens, self.memory.weight))
        return sum(tokens for tokens, weight in parts if weight)


class RowsBesideMemory(TrainingSet):
    """New rows, and in each step as many replayed ones.

    Args:
        sets: the new modality's examples.
        batch_size: examples a step, of each kind.
        seed: of the order.
        memory: the replayed rows.
    """

    def __init__(
        self, sets: Sequence[ExampleSet], batch_size: int, seed: int, memory: TrainingSet
    ) -> None:
        super().__init__(sets, batch_size, seed)
        self.memory = memory

    def batch(self, step: int) -> MemoryBatch:
        """The two batches of a step: a pure function of data, seed and step."""
        new, memory = super().batch(step), self.memory.batch(step)
        both = {**vars(new), "weight": 1.0}
        return MemoryBatch(**both, memory=memory, new_weight=new.weight)


class GuardedModel(MultimodalModel):
    """The same backbone and connectors; its loss is an objective's."""

    def __init__(self, model: MultimodalModel, objective: Objective) -> None:
        super().__init__(model.backbone, dict(model.connectors.items()), model.modality_numbers)
        self._plain, self._objective = [model], objective  # a list hides it: no second child

    def forward(self, batch: Batch) -> Tensor:
        """The objective, float32 scalar."""
        return self._objective(self._plain[0], batch)


def guarded_fine_tune(
    call: Call,
    settings: PhaseSettings,
    connectors: Mapping[str, Path],
    guard: GuardCall,
    *,
    mode: str,
    lora: LoraSettings,
    connector_learning_rate: float,
    train_embeddings: bool,
    result_fingerprint: str,
) -> None:
    """Trains the backbone and connectors on a new modality against forgetting the old ones.

    Args:
        call: the surroundings.
        settings: of the loop; the learning rate is the backbone's.
        connectors: modality -> artifact that holds its connector; the new modality first, behind
            it those that are replayed, whose connectors learn too.
        guard: against forgetting.
        mode: what of the backbone learns: `full`, `lora`, or `attention`.
        lora: rank and alpha.
        connector_learning_rate: of the connectors.
        train_embeddings: whether input and output embeddings learn too.
        result_fingerprint: what the connectors will be aligned to.
    """
    pairs = _connectors(call, connectors, result_fingerprint)
    loaded = assemble(call.backbone, pairs, call.system_prompt)
    rows = _rows(call, loaded, settings, list(connectors), guard)
    teacher = copy.deepcopy(loaded.model) if guard.name in ("lwf", "der") else None
    groups = [connector_group(loaded, name, connector_learning_rate) for name in connectors]
    if mode == "lora":
        wrap_lora(loaded.model, lora, call.seed + _STAGES * len(guard.earlier))
    groups.append(_backbone_group(loaded, settings.learning_rate, mode, train_embeddings))
    objective = _objective(loaded, guard, teacher, train_embeddings)
    guarded = replace(loaded, model=GuardedModel(loaded.model, objective))
    if not run_phase(call, guarded, settings, rows, groups):
        return
    if guard.name == "o-lora":
        save_subspace(call.out, input_directions(loaded.model.backbone), lora.rank)
    if mode == "lora":
        fold_lora(loaded.model)
    for record, connector in pairs:
        save_connector(call.out, record, connector)
    save_backbone(loaded.model.backbone, loaded.tokenizer, call.out / "backbone")


def _connectors(
    call: Call, folders: Mapping[str, Path], result_fingerprint: str
) -> list[tuple[ConnectorRecord, MixerConnector]]:
    pairs = []
    for modality, folder in folders.items():
        old = read_record(folder, modality)
        check_alignment(old, call.backbone_fingerprint, call.label)
        record = ConnectorRecord(modality, old.shape, result_fingerprint)
        pairs.append((record, read_connector(folder, old)))
    return pairs


def _rows(
    call: Call,
    loaded: LoadedModel,
    settings: PhaseSettings,
    modalities: list[str],
    guard: GuardCall,
) -> TrainingSet:
    """All rows of the new modality, with the old ones' replay among them or beside them."""
    new, *old = examples_of(call, loaded, modalities)
    if guard.fraction is None:
        return TrainingSet([new], settings.batch_size, call.seed)
    kept = [replay_rows(len(each), guard.fraction, call.seed) for each in old]
    if guard.name == "replay":
        chosen = [range(len(new)), *kept]
        return TrainingSet([new, *old], settings.batch_size, call.seed, chosen)
    memory = TrainingSet(old, settings.batch_size, call.seed, kept)
    return RowsBesideMemory([new], settings.batch_size, call.seed, memory)


def _backbone_group(
    loaded: LoadedModel, rate: float, mode: str, train_embeddings: bool
) -> ParameterGroup:
    if mode == "attention":
        return attention_group(loaded, rate)
    return backbone_group(loaded, rate, mode, train_embeddings)


def _objective(
    loaded: LoadedModel, guard: GuardCall, teacher: MultimodalModel | None, train_embeddings: bool
) -> Objective:
    """The loss on the new rows, and beside it what the guard adds."""
    settings = guard.settings
    if guard.name == "ewc":
        assert guard.fisher is not None
        parameters = weighed_parameters(loaded, train_embeddings)
        return _beside(
            ElasticPenalty(parameters, load_file(guard.fisher / FISHER), settings["strength"])
        )
    if guard.name == "o-lora" and guard.earlier:
        directions = input_directions(loaded.model.backbone)
        return _beside(Orthogonality(directions, guard.earlier, settings["strength"]))
    if guard.name == "lwf":
        assert teacher is not None
        return _distilled(teacher, settings["strength"], settings["temperature"])
    if guard.name == "der":
        assert teacher is not None
        return _with_memory(teacher, settings["alpha"], settings["beta"])
    return lambda model, batch: model(batch)


def _beside(penalty: Callable[[], Tensor]) -> Objective:
    return lambda model, batch: model(batch) + penalty()


def _distilled(teacher: MultimodalModel, strength: float, temperature: float) -> Objective:
    """Learning without forgetting: what the old model would say of the new rows is kept."""

    def objective(model: MultimodalModel, batch: Batch) -> Tensor:
        said, wanted = answer_logits(model, batch), _frozen_logits(teacher, batch)
        loss = functional.cross_entropy(said, answer_tokens(batch))
        return loss + strength * distillation(said, wanted, temperature)

    return objective


def _with_memory(teacher: MultimodalModel, alpha: float, beta: float) -> Objective:
    """Dark experience replay: what the old model says of old rows is kept."""

    def objective(model: MultimodalModel, batch: Batch) -> Tensor:
        assert isinstance(batch, MemoryBatch)
        said, wanted = answer_logits(model, batch.memory), _frozen_logits(teacher, batch.memory)
        replayed = dark_experience(said, wanted, answer_tokens(batch.memory), alpha, beta)
        loss: Tensor = model(batch)
        return batch.new_weight * loss + batch.memory.weight * replayed

    return objective


@torch.no_grad()
def _frozen_logits(teacher: MultimodalModel, batch: Batch) -> Tensor:
    return answer_logits(teacher, batch)
