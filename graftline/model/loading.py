"""Model folders on disk: connectors with their records, and whole multimodal models."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from graftline.errors import GraftlineError
from graftline.model.building import BUILDING
from graftline.model.connectors import MixerConnector
from graftline.model.multimodal import MultimodalModel
from graftline.model.prompts import PromptEncoder


class Misaligned(GraftlineError):
    """A connector beside a backbone that it was not aligned to."""


@dataclass(frozen=True)
class ConnectorRecord:
    """What must be known to rebuild a connector.

    Attributes:
        modality: whose connector it is.
        shape: arguments of `MixerConnector`.
        aligned_to: fingerprint of the backbone that it was trained beside.
    """

    modality: str
    shape: Mapping[str, float | int]
    aligned_to: str

    def build(self) -> MixerConnector:
        """A connector of this shape, weights not set."""
        with BUILDING:
            return MixerConnector(**self.shape)  # type: ignore[arg-type]


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory with what speaks its language."""

    model: MultimodalModel
    prompts: PromptEncoder
    tokenizer: Any
    records: Mapping[str, ConnectorRecord]


def save_connector(folder: Path, record: ConnectorRecord, connector: MixerConnector) -> None:
    """Writes `connector-<modality>.safetensors` and its record into an artifact's folder."""
    stem = f"connector-{record.modality}"
    weights = {k: v.detach().cpu().contiguous() for k, v in connector.state_dict().items()}
    save_file(weights, folder / f"{stem}.safetensors")
    content = {"shape": dict(record.shape), "aligned_to": record.aligned_to}
    (folder / f"{stem}.json").write_text(json.dumps(content, indent=2), encoding="utf-8")


def read_record(folder: Path, modality: str) -> ConnectorRecord:
    """Reads a connector's record.

    Raises:
        GraftlineError: the folder holds no connector of this modality.
    """
    path = folder / f"connector-{modality}.json"
    if not path.is_file():
        raise GraftlineError(f"{folder} holds no connector for {modality} ({path.name} is absent).")
    content = json.loads(path.read_text(encoding="utf-8"))
    return ConnectorRecord(modality, content["shape"], content["aligned_to"])


def read_connector(folder: Path, record: ConnectorRecord) -> MixerConnector:
    """Reads a connector's weights, all of them and nothing else.

    Raises:
        GraftlineError: names the tensor that is missing, surplus or not finite.
    """
    path = folder / f"connector-{record.modality}.safetensors"
    connector = record.build()
    weights = load_file(path)
    try:
        connector.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise GraftlineError(f"{path} does not fit its record: {error}") from error
    for name, value in weights.items():
        if not torch.isfinite(value).all():
            raise GraftlineError(f"{path}: {name} holds NaN or infinity; train it again.")
    return connector


def check_alignment(record: ConnectorRecord, backbone: str, role: str) -> None:
    """Refuses a connector beside a backbone that it was not trained beside.

    Raises:
        Misaligned: names both fingerprints.
    """
    if record.aligned_to != backbone:
        raise Misaligned(
            f"{role}: the {record.modality} connector was aligned to backbone "
            f"{record.aligned_to[:12]}, not to {backbone[:12]}. Realign it first."
        )


def assemble(
    backbone: tuple[Any, Any],
    connectors: Sequence[tuple[ConnectorRecord, MixerConnector]],
    system_prompt: str,
) -> LoadedModel:
    """Puts a loaded backbone (model, tokenizer) and connectors together."""
    model, tokenizer = backbone
    tokens = {record.modality: connector.tokens for record, connector in connectors}
    prompts = PromptEncoder(tokenizer, tokens, system_prompt)
    modules = {
        record.modality: connector.to(device=model.device, dtype=torch.float32)
        for record, connector in connectors
    }
    multimodal = MultimodalModel(model, modules, prompts.modality_numbers)
    records = {record.modality: record for record, _ in connectors}
    return LoadedModel(multimodal.eval(), prompts, tokenizer, records)


def new_connector(
    modality: str,
    backbone: Any,
    features: Tensor,
    settings: Mapping[str, int],
    seed: int,
    aligned_to: str,
) -> tuple[ConnectorRecord, MixerConnector]:
    """A connector with fresh weights, sized for an encoder and a backbone.

    Args:
        modality: whose.
        backbone: the causal LM that it will speak to.
        features: (rows, tokens, width) of its training rows.
        settings: `tokens` and `hidden` of the recipe.
        seed: of the weights.
        aligned_to: fingerprint of the backbone.
    """
    embeddings = backbone.get_input_embeddings().weight.detach().float()
    shape: dict[str, float | int] = {
        "encoder_tokens": features.shape[1],
        "encoder_width": features.shape[2],
        "tokens": settings["tokens"],
        "hidden": settings["hidden"],
        "embedding_width": embeddings.shape[1],
        "embedding_scale": round(float(embeddings.square().mean().sqrt()), 6),
    }
    record = ConnectorRecord(modality, shape, aligned_to)
    connector = record.build()
    connector.reset(features, seed)
    return record, connector
