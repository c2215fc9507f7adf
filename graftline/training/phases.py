"""Align, fine-tune and realign: the three ways to call the training loop."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from graftline.data.examples import ExampleSet, TrainingSet, replay_rows
from graftline.data.features import FeatureTable
from graftline.model.backbone import save_backbone
from graftline.model.connectors import MixerConnector
from graftline.model.loading import (
    ConnectorRecord,
    LoadedModel,
    assemble,
    check_alignment,
    new_connector,
    read_connector,
    read_record,
    save_connector,
)
from graftline.recipe import LoraSettings, PhaseSettings
from graftline.team import current
from graftline.training.loop import train
from graftline.training.lora import fold_lora, wrap_lora
from graftline.training.optimizer import ParameterGroup

RIDGE = 3.0
"""Penalty of the closed-form start of a connector, as a share of its features' mean square."""


@dataclass(frozen=True)
class Call:
    """What every phase needs beside its own settings.

    Attributes:
        backbone: loaded model and tokenizer; fine-tuning changes it in place.
        backbone_fingerprint: which backbone that is.
        features: modality -> features artifact.
        system_prompt: of the chat template.
        seed: of connector weights, order and replay.
        work: folder for checkpoints.
        out: folder to fill.
        label: what the progress bar says.
    """

    backbone: tuple[Any, Any]
    backbone_fingerprint: str
    features: dict[str, Path]
    system_prompt: str
    seed: int
    work: Path
    out: Path
    label: str


def align(call: Call, settings: PhaseSettings, modality: str, shape: dict[str, int]) -> None:
    """Trains a new connector alone on all of its modality's rows; the backbone stays frozen.

    Args:
        call: the surroundings.
        settings: of the loop.
        modality: whose connector.
        shape: `tokens` and `hidden` of the connector.
    """
    features = FeatureTable(call.features[modality] / "train")[:]
    record, connector = new_connector(
        modality, call.backbone[0], features, shape, call.seed, call.backbone_fingerprint
    )
    loaded = assemble(call.backbone, [(record, connector)], call.system_prompt)
    examples = examples_of(call, loaded, [modality])
    table = loaded.model.backbone.get_input_embeddings().weight.detach().float().cpu()
    words = _answer_words(table, examples[0], connector.tokens)
    connector.fit(features, words, table.mean(0), RIDGE)
    rows = TrainingSet(examples, settings.batch_size, call.seed)
    group = connector_group(loaded, modality, settings.learning_rate)
    if run_phase(call, loaded, settings, rows, [group]):
        save_connector(call.out, record, connector)


def realign(
    call: Call,
    settings: PhaseSettings,
    modality: str,
    connector: Path,
    fraction: float,
    part: Literal["output", "all"],
) -> None:
    """Trains an old connector on its replay beside the merged, frozen backbone (MERA, step 4).

    Args:
        call: the surroundings.
        settings: of the loop.
        modality: whose connector.
        connector: artifact that holds it.
        fraction: share of the modality's training rows that was kept.
        part: `all` of the connector learns (the paper), or its `output` layer [ours].
    """
    old = read_record(connector, modality)
    record = ConnectorRecord(modality, old.shape, call.backbone_fingerprint)
    module = read_connector(connector, old)
    loaded = assemble(call.backbone, [(record, module)], call.system_prompt)
    examples = examples_of(call, loaded, [modality])
    kept = replay_rows(len(examples[0]), fraction, call.seed)
    rows = TrainingSet(examples, settings.batch_size, call.seed, [kept])
    group = connector_group(loaded, modality, settings.learning_rate)
    if part == "output":
        group = replace(group, parameters=module.output_parameters())
    if run_phase(call, loaded, settings, rows, [group]):
        save_connector(call.out, record, module)


def fine_tune(
    call: Call,
    settings: PhaseSettings,
    connectors: dict[str, Path],
    *,
    mode: str,
    lora: LoraSettings,
    connector_learning_rate: float,
    train_embeddings: bool,
    result_fingerprint: str,
) -> None:
    """Trains the backbone and its connectors together (MERA, step 2; `joint` with several).

    Args:
        call: the surroundings.
        settings: of the loop; the learning rate is the backbone's.
        connectors: modality -> artifact that holds its aligned connector.
        mode: `full`, `lora`, or `connector` (the backbone stays frozen).
        lora: rank and alpha.
        connector_learning_rate: of the connectors.
        train_embeddings: whether input and output embeddings learn too.
        result_fingerprint: what the connectors will be aligned to.
    """
    pairs: list[tuple[ConnectorRecord, MixerConnector]] = []
    frozen = mode == "connector"
    for modality, folder in connectors.items():
        old = read_record(folder, modality)
        check_alignment(old, call.backbone_fingerprint, call.label)
        aligned_to = call.backbone_fingerprint if frozen else result_fingerprint
        pairs.append(
            (ConnectorRecord(modality, old.shape, aligned_to), read_connector(folder, old))
        )
    loaded = assemble(call.backbone, pairs, call.system_prompt)
    examples = examples_of(call, loaded, list(connectors))
    rows = TrainingSet(examples, settings.batch_size, call.seed)
    groups = [connector_group(loaded, name, connector_learning_rate) for name in connectors]
    if not frozen:
        if mode == "lora":
            wrap_lora(loaded.model, lora, call.seed)
        groups.append(backbone_group(loaded, settings.learning_rate, mode, train_embeddings))
    if not run_phase(call, loaded, settings, rows, groups):
        return
    if mode == "lora":
        fold_lora(loaded.model)
    for record, connector in pairs:
        save_connector(call.out, record, connector)
    if not frozen:
        save_backbone(loaded.model.backbone, loaded.tokenizer, call.out / "backbone")


def _answer_words(table: Tensor, examples: ExampleSet, parts: int) -> Tensor:
    """How each part of a row's answer differs from other answers to the same question.

    Args:
        table: float32 (vocabulary, embedding width), the backbone's input embeddings.
        examples: the rows.
        parts: how many parts an answer is cut into, in reading order; the parts of an answer that
            is shorter than that repeat its tokens.

    Returns:
        float32 (rows, parts, embedding width): mean embedding of a part's tokens, less the mean
        of that over the rows that ask the same.
    """
    words = torch.stack(
        [
            torch.stack([table[part].mean(0) for part in _cut(answer.answer_ids[:-1], parts)])
            for answer in (examples.prompt(row, True) for row in range(len(examples)))
        ]
    )
    for question in {row["question"] for row in examples.rows}:
        same = torch.tensor([row["question"] == question for row in examples.rows])
        words[same] -= words[same].mean(0)
    return words


def _cut(token_ids: Sequence[int], parts: int) -> list[list[int]]:
    """Parts of nearly equal length, none of them empty."""
    count = len(token_ids)
    edges = [part * count // parts for part in range(parts + 1)]
    return [list(token_ids[start : max(end, start + 1)]) for start, end in pairwise(edges)]


def examples_of(call: Call, loaded: LoadedModel, modalities: Sequence[str]) -> list[ExampleSet]:
    """The training rows of some modalities."""
    return [ExampleSet(call.features[name], name, "train", loaded.prompts) for name in modalities]


def run_phase(
    call: Call,
    loaded: LoadedModel,
    settings: PhaseSettings,
    rows: TrainingSet,
    groups: Sequence[ParameterGroup],
) -> bool:
    """Trains, and writes what happened at each step and how long it took into `call.out`.

    Returns:
        Whether this process has a result to write: of a team that trained together one has.
    """
    started = time.monotonic()
    history = train(loaded.model, groups, rows.batch, settings, call.work, call.label)
    if not current().first:
        return False
    (call.out / "history.json").write_text(json.dumps(asdict(history)), encoding="utf-8")
    timing = {"seconds": round(time.monotonic() - started, 3)}
    (call.out / "timing.json").write_text(json.dumps(timing), encoding="utf-8")
    return True


def connector_group(loaded: LoadedModel, modality: str, rate: float) -> ParameterGroup:
    """All that a connector learns."""
    parameters = list(loaded.model.connectors[modality].parameters())
    return ParameterGroup(f"connector-{modality}", parameters, rate)


def backbone_group(
    loaded: LoadedModel, rate: float, mode: str, train_embeddings: bool
) -> ParameterGroup:
    """What the backbone learns in this mode; embeddings only where asked."""
    backbone = loaded.model.backbone
    if mode == "lora":
        chosen = [p for name, p in backbone.named_parameters() if "lora_" in name]
        return ParameterGroup("backbone", chosen, rate)
    embeddings = {
        id(layer.weight)
        for layer in (backbone.get_input_embeddings(), backbone.get_output_embeddings())
    }
    chosen = [
        parameter
        for parameter in backbone.parameters()
        if train_embeddings or id(parameter) not in embeddings
    ]
    return ParameterGroup("backbone", chosen, rate)
