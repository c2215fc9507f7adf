"""Frozen encoders by recipe: the starter's own by name, and the user's by a mapping."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, cast

import torch

from graftline.data.kinds import FEATURES
from graftline.encoders.arrays import ArrayEncoder
from graftline.encoders.own_class import OwnClassEncoder, class_identity, settings_problem
from graftline.encoders.timm_models import TimmModel, timm_problem
from graftline.encoders.towers import TransformersTower
from graftline.errors import GraftlineError
from graftline.manifest import canonical_json
from graftline.model.encoders import Encoder, encoder_identity, load_encoder
from graftline.model.pretrained import check_trust, folder_of, identity, pin_problem
from graftline.settings.models import (
    ENCODER_PARTS,
    STARTERS,
    FeatureRows,
    OwnEncoder,
    Pretrained,
    PythonEncoder,
    TimmEncoder,
    TransformersEncoder,
)
from graftline.step_code import source_digest

TAKES = {encoder: kind for kind, encoder in STARTERS.items()}
"""The starter's encoders, and what each of them encodes."""
SIZE = "expected"
"""The part of an encoder's settings that only a plan reads."""


def describe_encoder(encoder: str | OwnEncoder, media: str) -> dict[str, Any]:
    """What a plan records of an encoder, without loading its weights.

    Args:
        encoder: as the recipe has it.
        media: what its rows hold.

    Returns:
        `name` and `sha256`; of a user's encoder also `media`, `settings` and where it comes from.

    Raises:
        GraftlineError: there is no such encoder, folder or class.
    """
    if encoder == FEATURES:
        encoder = FeatureRows(source="features")
    if isinstance(encoder, str):
        return encoder_identity(encoder)
    settings = encoder.model_dump(mode="json", exclude={SIZE})
    recorded: dict[str, Any] = {"media": media, "settings": settings}
    if isinstance(encoder, TransformersEncoder):
        recorded["weights"] = identity(encoder, code=encoder.trust_remote_code)
        called = f"transformers:{encoder.name or encoder.folder}"
    elif isinstance(encoder, TimmEncoder):
        recorded["weights"] = identity(encoder)
        called = f"timm:{encoder.name or encoder.folder}"
    elif isinstance(encoder, PythonEncoder):
        recorded["class"] = class_identity(encoder.python)
        called = f"python:{encoder.python}"
    else:
        called = FEATURES
    digest = hashlib.sha256(canonical_json(_content(recorded)).encode()).hexdigest()
    return {"name": called, "sha256": digest, **recorded}


def _content(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """What features depend on: not where a folder lies, since its content is counted."""
    settings = {key: value for key, value in recorded["settings"].items() if key != "folder"}
    weights = {k: v for k, v in recorded.get("weights", {}).items() if k != "folder"}
    return {**recorded, "settings": settings, "weights": weights}


def encoder_code(recorded: Mapping[str, Any]) -> dict[str, str]:
    """Digest of the code behind a user's encoder; nothing for a starter's, whose step has its."""
    return {"encoder_code": source_digest("encoders/*.py")} if "settings" in recorded else {}


def open_encoder(recorded: Mapping[str, Any], device: torch.device | str = "cpu") -> Encoder:
    """Loads a frozen encoder.

    Args:
        recorded: by `describe_encoder`.
        device: where it computes; features always come back on the CPU.

    Raises:
        GraftlineError: weights cannot be fetched or read, have changed, or do not fit.
    """
    if "settings" not in recorded:
        return load_encoder(recorded["name"], device)
    settings, media = recorded["settings"], recorded["media"]
    name, sha256 = recorded["name"], recorded["sha256"]
    if settings["source"] == "features":
        return ArrayEncoder(FeatureRows(**settings), sha256)
    if settings["source"] == "python":
        own = PythonEncoder(**settings)
        if class_identity(own.python) != recorded["class"]:
            raise GraftlineError(f"{own.python}: its code changed since the run was planned")
        return OwnClassEncoder(own, sha256)
    if settings["source"] == "timm":
        folder = folder_of(recorded["weights"])
        given = TimmEncoder(**settings)
        return TimmModel(given, media, folder, name, sha256, torch.device(device))
    tower = TransformersEncoder(**settings)
    check_trust(tower.trust_remote_code)
    folder = folder_of(recorded["weights"], code=tower.trust_remote_code)
    return TransformersTower(tower, media, folder, name, sha256, torch.device(device))


def same_here(recorded: Mapping[str, Any]) -> str:
    """The digest that a recorded encoder has on this machine, with this version.

    Raises:
        GraftlineError: there is no such encoder, folder or class here.
    """
    if "settings" not in recorded:
        return encoder_identity(recorded["name"])["sha256"]
    part = ENCODER_PARTS[f"[{recorded['settings']['source']}]"]
    settings = cast(OwnEncoder, part(**recorded["settings"]))
    return str(describe_encoder(settings, recorded["media"])["sha256"])


def encoder_problem(encoder: str | OwnEncoder, media: str) -> str | None:
    """What stands in the way of an encoder, as far as it is known without fetching weights."""
    try:
        if isinstance(encoder, TransformersEncoder):
            check_trust(encoder.trust_remote_code)
            if media not in TransformersTower.MEDIA:
                known = ", ".join(TransformersTower.MEDIA)
                return f"source: transformers encodes {known}, not {media}; use source: python"
        elif isinstance(encoder, TimmEncoder):
            if media not in TimmModel.MEDIA:
                return f"source: timm encodes {', '.join(TimmModel.MEDIA)}, not {media}"
            if problem := timm_problem():
                return problem
        elif (encoder == FEATURES or isinstance(encoder, FeatureRows)) and media != FEATURES:
            return f"takes arrays, and the rows hold {media}; write media: features"
        elif media == FEATURES and isinstance(encoder, str) and encoder != FEATURES:
            return f"{encoder} takes no features; write source: features or source: python"
        elif isinstance(encoder, str) and TAKES.get(encoder, media) != media:
            return f"{encoder} encodes {TAKES[encoder]}, and the rows hold {media}"
        problem = pin_problem(encoder) if isinstance(encoder, Pretrained) else None
        if problem is None:
            describe_encoder(encoder, media)
        if isinstance(encoder, PythonEncoder):
            problem = settings_problem(encoder)
    except GraftlineError as error:
        return str(error)
    return problem
