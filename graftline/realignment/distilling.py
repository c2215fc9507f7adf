"""Realigning from the old model: the connector learns to make the new backbone behave as the old.

MERA realigns a connector on kept rows and their answers. Here the teacher is what the connector
was trained beside, the old backbone with the old connector, frozen. What both are shown is drawn
from recorded statistics (`graftline.realignment.statistics`), with the teacher's own greedy answers
to the recorded questions; the loss is the divergence of the two models' distributions over the
answers' tokens, `KL(old || new)` [ours; distillation as Li & Hoiem, arXiv 1606.09282].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from graftline.data.examples import ExampleSet, TrainingSet, question_batches, replay_rows
from graftline.evaluation.answering import answer_batches
from graftline.model.loading import (
    ConnectorRecord,
    LoadedModel,
    assemble,
    read_connector,
    read_record,
    save_connector,
)
from graftline.model.multimodal import Batch, MultimodalModel
from graftline.model.prompts import PromptEncoder
from graftline.realignment.statistics import LastLayer, TokenStatistics, inner_vectors
from graftline.recipe_parts import PhaseSettings
from graftline.training.distillation import answer_logits, answer_tokens, distillation
from graftline.training.objective import ObjectiveModel
from graftline.training.optimizer import ParameterGroup
from graftline.training.phases import Call, run_phase

BATCH = 200
"""Drawn questions that the teacher answers at once."""


class InnerExamples(ExampleSet):
    """Rows whose media are inner vectors of a connector.

    Args:
        modality: whose.
        inner: float32 (rows, inner width).
        questions: of each row.
        answers: of each row; what is trained on.
        encoder: makes the prompts.
    """

    def __init__(
        self,
        modality: str,
        inner: Tensor,
        questions: Sequence[str],
        answers: Sequence[str],
        encoder: PromptEncoder,
    ) -> None:
        # Nothing is read from a folder, so the base's own start is not called.
        self.modality = modality
        self.rows: list[dict[str, Any]] = [
            {"task": "question", "question": question, "answers": [answer]}
            for question, answer in zip(questions, answers, strict=True)
        ]
        self.features = inner  # type: ignore[assignment]  # one vector a row is all that is asked
        self._encoder = encoder
        self.pad_id = encoder.pad_id
        self._prompts = {}


@dataclass(frozen=True)
class Teacher:
    """The old model.

    Attributes:
        backbone: loaded model and tokenizer.
        connector: artifact that holds the old connector.
    """

    backbone: tuple[Any, Any]
    connector: Path


@dataclass(frozen=True)
class Lesson:
    """What is learned from.

    Attributes:
        statistics: what is drawn from; `None` where rows are there.
        samples: how many vectors are drawn.
        max_new_tokens: longest answer that the teacher gives to what is drawn.
        fraction: share of the training rows that is seen, with their true answers; 0 for none.
        temperature: of the distributions.
        answers: weight of the answers' cross-entropy beside the divergence.
    """

    statistics: TokenStatistics | None
    samples: int
    max_new_tokens: int
    fraction: float
    temperature: float
    answers: float


def distil(
    call: Call,
    settings: PhaseSettings,
    modality: str,
    connector: Path,
    teacher: Teacher,
    lesson: Lesson,
) -> None:
    """Trains a connector's last layer beside a frozen new backbone to say what the old model says.

    Args:
        call: the surroundings, with the new backbone.
        settings: of the loop.
        modality: whose connector.
        connector: artifact that holds what is trained.
        teacher: the old model.
        lesson: what is learned from.
    """
    learning = with_last_layer(call.backbone, modality, connector, call.system_prompt)
    wanted = with_last_layer(teacher.backbone, modality, teacher.connector, call.system_prompt)
    examples = lesson_examples(call, learning, wanted, modality, lesson)
    rows = TrainingSet(examples, settings.batch_size, call.seed)
    for parameter in wanted.model.parameters():
        parameter.requires_grad_(False)

    def objective(model: MultimodalModel, batch: Batch) -> Tensor:
        said = answer_logits(model, batch)
        with torch.no_grad():
            told = answer_logits(wanted.model, batch)
        loss = distillation(said, told, lesson.temperature)
        if lesson.answers:
            loss = loss + lesson.answers * functional.cross_entropy(said, answer_tokens(batch))
        return loss

    layer = last_layer(learning, modality)
    guarded = replace(learning, model=ObjectiveModel(learning.model, objective))
    group = ParameterGroup(
        f"connector-{modality}", layer.connector.output_parameters(), settings.learning_rate
    )
    if not run_phase(call, guarded, settings, rows, [group]):
        return
    shape = learning.records[modality].shape
    record = ConnectorRecord(modality, shape, call.backbone_fingerprint)
    save_connector(call.out, record, layer.connector)


def with_last_layer(
    backbone: tuple[Any, Any], modality: str, connector: Path, system_prompt: str
) -> LoadedModel:
    """A model whose media are inner vectors: of its connector only the last layer is asked."""
    record = read_record(connector, modality)
    module = read_connector(connector, record)
    loaded = assemble(backbone, [(record, module)], system_prompt)
    loaded.model.connectors[modality] = LastLayer(module)
    return loaded


def last_layer(loaded: LoadedModel, modality: str) -> LastLayer:
    """The layer that `with_last_layer` put into a model."""
    layer = loaded.model.connectors[modality]
    assert isinstance(layer, LastLayer)
    return layer


def lesson_examples(
    call: Call, learning: LoadedModel, wanted: LoadedModel, modality: str, lesson: Lesson
) -> list[ExampleSet]:
    """What is drawn, with the old model's answers; and rows that are there, with their own."""
    found: list[ExampleSet] = []
    if lesson.statistics is not None:
        inner, questions = lesson.statistics.sample(lesson.samples, call.seed)
        answers = old_answers(call.label, wanted, modality, inner, questions, lesson.max_new_tokens)
        found.append(InnerExamples(modality, inner, questions, answers, learning.prompts))
    if lesson.fraction:
        kept = ExampleSet(call.features[modality], modality, "train", learning.prompts)
        chosen = replay_rows(len(kept), lesson.fraction, call.seed)
        connector = last_layer(learning, modality).connector
        inner = inner_vectors(connector, kept.features[chosen])
        rows = [kept.rows[row] for row in chosen]
        questions = [row["question"] for row in rows]
        answers = [row["answers"][0] for row in rows]
        found.append(InnerExamples(modality, inner, questions, answers, learning.prompts))
    return found


def old_answers(
    label: str,
    wanted: LoadedModel,
    modality: str,
    inner: Tensor,
    questions: Sequence[str],
    max_new_tokens: int,
) -> list[str]:
    """The old model's greedy answers to questions about drawn media."""
    asked = InnerExamples(modality, inner, questions, [""] * len(questions), wanted.prompts)
    return answer_batches(
        wanted, question_batches(asked, BATCH), max_new_tokens=max_new_tokens, label=label
    )
