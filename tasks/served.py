"""A finished model as MLflow serves it: media as base64, a question; an answer a row.

MLflow copies this file beside the model and runs it when the model is loaded ("models from code"),
so nothing is pickled. Weights are not copied: the model's configuration links the folders in which
they lie, and loading compares them with their manifests.
"""

from __future__ import annotations

import base64
import tempfile
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import BAD_REQUEST

from graftline.asking.asker import Asker
from graftline.asking.conversation import Shown, Turn, check_question
from graftline.asking.links import follow_links
from graftline.errors import GraftlineError


class ServedModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """Answers questions about media."""

    def load_context(self, context: Any) -> None:
        """Finds the model's parts; its weights are read at the first question.

        Raises:
            GraftlineError: a part is not where it was, or is damaged.
        """
        self.asker = Asker(follow_links(context.model_config["parts"]))

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Answers every row.

        Args:
            context: unused; the model is loaded.
            model_input: a column a modality with files as base64, empty where nothing is shown, and
                the column `question`.
            params: unused.

        Returns:
            The column `answer`.

        Raises:
            MlflowException: lists every row that cannot be asked; the request is at fault.
        """
        del context, params
        conversations: list[list[Turn]] = []
        problems: list[str] = []
        with tempfile.TemporaryDirectory() as folder:
            for number, row in enumerate(model_input.to_dict("records"), start=1):
                try:
                    media = self._media(row, Path(folder), f"row {number}")
                    turns = [Turn(tuple(media), _question(row["question"]))]
                    self.asker.encode(turns)
                    conversations.append(turns)
                except GraftlineError as error:
                    text = str(error).replace(f"{folder}/", "")
                    named = text.startswith(f"row {number}, ")
                    problems.append(text if named else f"row {number}: {text}")
        if not problems:
            try:
                return pd.DataFrame({"answer": self.asker.answer(conversations)})
            except GraftlineError as error:
                problems.append(str(error))
        raise MlflowException("\n".join(problems), error_code=BAD_REQUEST)

    def _media(self, row: dict[str, Any], folder: Path, label: str) -> list[Shown]:
        """A row's media, in the order in which the model learned their modalities."""
        paths: list[Path] = []
        media = []
        for modality in self.asker.modalities:
            text = row.get(modality)
            if _is_empty(text):
                continue  # not shown: a column has a cell in every row
            paths.append(folder / f"{label}, {modality}")
            paths[-1].write_bytes(_decoded(text, f"{label}, {modality}"))
            media.append(self.asker.read(paths[-1], modality))
        return self.asker.show(media, paths)


def _is_empty(cell: object) -> bool:
    return bool(pd.api.types.is_scalar(cell) and pd.isna(cell)) or cell == ""


def _question(given: object) -> str:
    if not isinstance(given, str):
        raise GraftlineError(f"question: is no text ({type(given).__name__}); ask something")
    return check_question(given)


def _decoded(text: object, label: str) -> bytes:
    if not isinstance(text, str):
        raise GraftlineError(f"{label}: is no text; send the file's bytes as base64")
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:  # also of characters that are not ASCII
        raise GraftlineError(
            f"{label}: is no base64 ({error}); send the file's bytes so"
        ) from error


mlflow.models.set_model(ServedModel())
