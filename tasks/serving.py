"""A finished model in MLflow's pyfunc format, which `mlflow models serve` and others load."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow import pyfunc
from mlflow.models import Model, ModelSignature
from mlflow.types.schema import ColSpec, Schema

from graftline.asking.links import links_of
from graftline.asking.parts import Parts

CODE = Path(__file__).with_name("served.py")


def write_served(parts: Parts, out: Path, model: Model, notes: Mapping[str, Any]) -> None:
    """Writes the small files that serve a model: code, links to its weights, signature.

    Args:
        parts: the model.
        out: folder to make.
        model: MLflow's record of it, which names run and model.
        notes: metadata that whoever serves it sees.
    """
    pyfunc.save_model(
        str(out),
        python_model=str(CODE),
        model_config={"parts": links_of(parts)},
        signature=signature_of(parts),
        pip_requirements=["graftline"],
        mlflow_model=model,
        metadata=dict(notes),
    )


def signature_of(parts: Parts) -> ModelSignature:
    """A column a modality, a file as base64, which may be left out; the question; the answer."""
    media = [ColSpec("string", name, required=False) for name in parts.connectors]
    return ModelSignature(
        inputs=Schema([*media, ColSpec("string", "question")]),
        outputs=Schema([ColSpec("string", "answer")]),
    )
