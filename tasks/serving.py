"""A finished model in MLflow's pyfunc format, which `mlflow models serve` and others load."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mlflow import MlflowClient, pyfunc
from mlflow.entities import LoggedModelStatus
from mlflow.models import Model, ModelSignature
from mlflow.types.schema import ColSpec, Schema

CODE = Path(__file__).with_name("served.py")


def log_served(
    client: MlflowClient,
    links: Mapping[str, Any],
    run_id: str,
    model_id: str,
    notes: Mapping[str, Any],
) -> None:
    """Adds the small files that serve a model: code, links to its weights, signature.

    Args:
        client: of the server.
        links: the model's parts, as `graftline.asking.links` says where they lie.
        run_id: the run that made it.
        model_id: MLflow's record of it, which is ready afterwards.
        notes: metadata that whoever serves it sees.
    """
    with tempfile.TemporaryDirectory() as temporary:
        written = Path(temporary) / "model"
        pyfunc.save_model(
            str(written),
            python_model=str(CODE),
            model_config={"parts": dict(links)},
            signature=signature_of(links["connectors"]),
            pip_requirements=["graftline"],
            mlflow_model=Model(run_id=run_id, model_id=model_id),
            metadata=dict(notes),
        )
        client.log_model_artifacts(model_id, str(written))
    client.finalize_logged_model(model_id, LoggedModelStatus.READY)


def signature_of(modalities: Iterable[str]) -> ModelSignature:
    """A column a modality, a file as base64, which may be left out; the question; the answer."""
    media = [ColSpec("string", name, required=False) for name in modalities]
    return ModelSignature(
        inputs=Schema([*media, ColSpec("string", "question")]),
        outputs=Schema([ColSpec("string", "answer")]),
    )
