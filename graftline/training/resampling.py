"""Aligning a resampler: as `phases.align`, without the closed-form start, which it has none of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from graftline.data.examples import TrainingSet
from graftline.data.features import FeatureTable
from graftline.model.connector_kinds import build_connector
from graftline.model.loading import ConnectorRecord, assemble, save_connector
from graftline.recipe import PhaseSettings
from graftline.training.phases import Call, connector_group, examples_of, run_phase

_MEASURED = 1 << 25
"""Numbers whose mean and deviation stand for all: 128 MB in float32, of however many rows."""


def align_resampler(
    call: Call, settings: PhaseSettings, modality: str, shape: Mapping[str, Any]
) -> None:
    """Trains a new resampler alone on all of its modality's rows; the backbone stays frozen.

    Args:
        call: the surroundings.
        settings: of the loop.
        modality: whose connector.
        shape: `tokens`, `hidden`, `layers` and `heads` of the connector.
    """
    features = measured(FeatureTable(call.features[modality] / "train"))
    embeddings = call.backbone[0].get_input_embeddings().weight.detach().float()
    record = ConnectorRecord(
        modality,
        {
            "encoder_tokens": features.shape[1],
            "encoder_width": features.shape[2],
            **{name: shape[name] for name in ("tokens", "hidden", "layers", "heads")},
            "embedding_width": embeddings.shape[1],
            "embedding_scale": round(float(embeddings.square().mean().sqrt()), 6),
        },
        call.backbone_fingerprint,
    )
    connector = build_connector(record.shape)
    connector.reset(features, call.seed)
    loaded = assemble(call.backbone, [(record, connector)], call.system_prompt)
    rows = TrainingSet(examples_of(call, loaded, [modality]), settings.batch_size, call.seed)
    group = connector_group(loaded, modality, settings.learning_rate)
    if run_phase(call, loaded, settings, rows, [group]):
        save_connector(call.out, record, connector)


def measured(table: FeatureTable) -> Tensor:
    """Rows of a split at even distances: all of a small one, of a large one as many as fit.

    Returns:
        float32 (rows, tokens, width).
    """
    rows, tokens, width = table.shape
    count = min(rows, max(2, _MEASURED // (tokens * width)))
    return table[[number * rows // count for number in range(count)]]
