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

from graftline.data.examples import TrainingSet, replay_rows
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
from graftline.training.memory import MemoryBatch, RecordedLogits, RecordedRows, RowsBesideMemory
from graftline.training.objective import Objective, ObjectiveModel
from graftline.training.optimizer import ParameterGroup
from graftline.training.orthogonal import Orthogonality, input_directions, save_subspace
from graftline.training.phases import (
    Call,
    backbone_group,
    connector_group,
    examples_of,
    run_phase,
)

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
        logits: old modality -> folder of what was said of its kept rows when it was learned.
    """

    name: str
    settings: Mapping[str, float] = field(default_factory=dict)
    fraction: float | None = None
    fisher: Path | None = None
    earlier: Sequence[Path] = ()
    logits: Mapping[str, Path] = field(default_factory=dict)


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
    teacher = copy.deepcopy(loaded.model) if guard.name == "lwf" else None
    groups = [connector_group(loaded, name, connector_learning_rate) for name in connectors]
    if mode == "lora":
        wrap_lora(loaded.model, lora, call.seed + _STAGES * len(guard.earlier))
    groups.append(_backbone_group(loaded, settings.learning_rate, mode, train_embeddings))
    objective = _objective(loaded, guard, teacher, train_embeddings)
    guarded = replace(loaded, model=ObjectiveModel(loaded.model, objective))
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
    if guard.name == "der":
        recorded = [RecordedLogits(guard.logits[each.modality]) for each in old]
        memory = RecordedRows(old, settings.batch_size, call.seed, recorded)
        return RowsBesideMemory([new], settings.batch_size, call.seed, memory)
    kept = [replay_rows(len(each), guard.fraction, call.seed) for each in old]
    chosen = [range(len(new)), *kept]
    return TrainingSet([new, *old], settings.batch_size, call.seed, chosen)


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
        return _with_memory(settings["alpha"], settings["beta"])
    return lambda model, batch: model(batch)


def _beside(penalty: Callable[[], Tensor]) -> Objective:
    return lambda model, batch: model(batch) + penalty()


def _distilled(teacher: MultimodalModel, strength: float, temperature: float) -> Objective:
    """Learning without forgetting: what the old model would say of the new rows is kept."""

    def objective(model: MultimodalModel, batch: Batch) -> Tensor:
        said = answer_logits(model, batch)
        with torch.no_grad():
            wanted = answer_logits(teacher, batch)
        loss = functional.cross_entropy(said, answer_tokens(batch))
        return loss + strength * distillation(said, wanted, temperature)

    return objective


def _with_memory(alpha: float, beta: float) -> Objective:
    """Dark experience replay: what was said of old rows when they were learned is kept."""

    def objective(model: MultimodalModel, batch: Batch) -> Tensor:
        assert isinstance(batch, MemoryBatch)
        memory = batch.memory
        said, told = answer_logits(model, memory), memory.told.float()
        replayed = dark_experience(said, told, answer_tokens(memory), alpha, beta)
        loss: Tensor = model(batch)
        return batch.new_weight * loss + memory.weight * replayed

    return objective
