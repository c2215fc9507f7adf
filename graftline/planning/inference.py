"""What encoding and answering will cost, estimated before anything starts.

Operations are 2 N a token (a forward pass; Kaplan et al. 2020, arXiv 2001.08361): N is the
backbone's parameters where it answers, and the encoder's where it encodes. Answers are counted at
their longest. Joint questions and the held-out text, both short, are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from graftline.data.rows import SPLITS, split_file
from graftline.model.connector_kinds import build_connector, connector_parameters
from graftline.model.efficientnet import FrameEncoder, ImageEncoder
from graftline.model.point_sets import BasisPointSetEncoder
from graftline.model.whisper import WhisperAudioEncoder
from graftline.planning.plan import Step
from graftline.recipe import Recipe
from graftline.settings.models import FeatureRows, TimmEncoder, TransformersEncoder

FEATURE_BYTES = 2
"""Of a stored feature: float16."""
_STARTERS = (ImageEncoder, FrameEncoder, WhisperAudioEncoder, BasisPointSetEncoder)
_STARTERS_SHAPES = {encoder.name: (encoder.tokens, encoder.width) for encoder in _STARTERS}


def known_rows(recipe: Recipe, modality: str) -> dict[str, int]:
    """Split -> rows that a run uses; from the files, else from the recipe's `estimate.rows`."""
    found: dict[str, int] = {}
    assumed = {str(split): count for split, count in recipe.estimate.rows.get(modality, {}).items()}
    limits = {str(split): count for split, count in (recipe.data.rows or {}).items()}
    for split in SPLITS:
        try:
            path = split_file(Path(recipe.data.folder), modality, split)
            count = int(pq.read_metadata(path).num_rows)
        except (OSError, pa.ArrowException):
            if split not in assumed:
                continue
            count = assumed[split]
        found[split] = min(count, limits.get(split, count))
    return found


def encoder_shape(recipe: Recipe, modality: str) -> tuple[int, int] | None:
    """(tokens, width) of an encoder's features; None where that is not known before it is here."""
    encoder = recipe.modality(modality).encoder
    if isinstance(encoder, str):
        return _STARTERS_SHAPES.get(encoder)
    if isinstance(encoder, FeatureRows):
        return (encoder.tokens, encoder.width) if encoder.tokens and encoder.width else None
    if encoder.expected is None:
        return None
    tokens = encoder.expected.positions
    if isinstance(encoder, (TransformersEncoder, TimmEncoder)):
        tokens -= encoder.pooling == "patches"
        tokens = 1 if encoder.pooling in ("first", "mean") else tokens
        tokens = encoder.tokens or tokens
    return tokens, encoder.expected.width


def connector_size(recipe: Recipe, modality: str, features: tuple[int, int], width: int) -> int:
    """Parameters of a connector, from (tokens, width) of features and the width of the LLM."""
    shape = connector_parameters(recipe.modality(modality).connector)
    shape.pop("code", None)
    shape.pop("kind", None)
    tokens, own = features
    shape |= {"encoder_tokens": tokens, "encoder_width": own}
    with torch.device("meta"):
        connector = build_connector({**shape, "embedding_width": width, "embedding_scale": 1.0})
    return sum(parameter.numel() for parameter in connector.parameters())


def inference_flops(
    step: Step, recipe: Recipe, parameters: int | None, row_tokens: Mapping[str, float]
) -> float | None:
    """Operations of a step that encodes or answers; None for others, or where too little is known.

    Args:
        step: of a plan.
        recipe: the recipe.
        parameters: N of the backbone.
        row_tokens: modality -> tokens of a row.
    """
    modality = step.parameters.get("modality")
    if step.kind == "features":
        encoder = recipe.modality(str(modality)).encoder
        size = getattr(encoder, "expected", None)
        rows = sum(known_rows(recipe, str(modality)).values())
        return 2.0 * size.parameters * size.positions * rows if size and rows else None
    if step.kind != "evaluate" or parameters is None:
        return None
    rows = known_rows(recipe, str(modality)).get(step.parameters["split"], 0)
    tokens = row_tokens[str(modality)] + step.parameters["max_new_tokens"]
    return 2.0 * parameters * rows * tokens if rows else None


def feature_bytes(step: Step, recipe: Recipe) -> int | None:
    """Bytes that a features step writes; None where that is not known."""
    modality = str(step.parameters["modality"])
    shape = encoder_shape(recipe, modality)
    rows = sum(known_rows(recipe, modality).values())
    return rows * shape[0] * shape[1] * FEATURE_BYTES if shape and rows else None
